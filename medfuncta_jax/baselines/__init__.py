"""The systems that MedFuncta is measured against, where they are more than settings of its own parts."""
