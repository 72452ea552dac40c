"""Systems that MedFuncta is compared with and that settings of its own parts cannot express.

Each system is a module with the functions of `methods.Method`; the core does not depend on any of them. Codebooks,
contrastive losses, contexts chosen by gradients and pyramids of widths gained nothing in any measurement of the paper
or of this project.
"""
