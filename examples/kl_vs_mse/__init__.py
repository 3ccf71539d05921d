"""When KL and when MSE: the study of Kim et al. (IJCAI 2021). Start with ``python -m examples.kl_vs_mse --help``."""
