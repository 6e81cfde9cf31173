"""What the network predicts, without output preconditioning, which only one of the four knows."""


def get_variants(base):
    plain = {"diffusion.precondition": False, "diffusion.balance_loss": False}
    return {kind: {"diffusion.model_mean_type": kind, **plain}
            for kind in ("mollified_epsilon", "epsilon", "v", "xstart")}
