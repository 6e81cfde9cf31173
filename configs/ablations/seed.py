"""Nothing but the seed: the spread of the base, which differences on other axes have to exceed."""


def get_variants(base):
    return {f"seed {seed}": {"run.seed": seed} for seed in range(base.run.seed, base.run.seed + 3)}
