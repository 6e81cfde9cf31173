"""How many of the nearest sampled points a node of the regular grid averages."""


def get_variants(base):
    return {f"k {k}": {"model.knn_neighbours": k} for k in (1, 3, 8)}
