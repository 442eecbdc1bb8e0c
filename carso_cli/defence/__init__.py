"""The paper's method, Section by Section; one file for each step.

- 4.1 Architecture: `representation` (what the purifier sees), `defended_model` (Figure 1 as one module)
- 4.2 First principles: why the purifier sees layer outputs and not the image: `representation`
- 4.3 Hierarchical encoding: `conditioning`, `vae` (the purifier), `decoder`
- 4.4 Balanced batches: `carso_cli.training.balanced_batch`; the loss on them (Section 3): `elbo`
- 4.5 Robust aggregation, Appendix B: `aggregation`

Beside them: `answer`, what a defence says about images; `release_format`, the authors' published files.
"""
