"""The systems that MedFuncta is measured against, where they are more than settings of its own parts.

Each is a module with the functions of `methods.Method`; the core knows of none of them. Codebooks, contrastive losses,
contexts chosen by gradients and pyramids of widths gained nothing in any measurement of the paper or of ours.
"""
