import importlib
import subprocess
import sys

import pytest
import torch

from data.coordinates import Coordinates
from models import tracing
from models.build import build_decoder
from tests.scripts import ROOT
from tests.tiny import tiny_config


@tracing.untraced
def whether_it_is_traced(extra=0):
    return torch.compiler.is_compiling() + extra


@tracing.constant
def imports_something():
    return importlib.import_module("math").pi > 3  # torch.compile refuses to trace an import


def test_an_untraced_function_runs_as_it_is_between_two_graphs():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.sin() + whether_it_is_traced(extra=2) + x.cos(), backend=keep)
    x = torch.linspace(0, 1, 5)
    torch.testing.assert_close(compiled(x), x.sin() + 2 + x.cos())
    assert len(graphs) == 2
    assert whether_it_is_traced(extra=2) == 2


def test_a_constant_function_is_called_while_a_single_graph_is_traced():
    compiled = torch.compile(lambda x: x + imports_something(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


def test_a_compiled_network_finds_the_neighbours_of_every_new_set_of_coordinates(tmp_path):
    config = tiny_config(tmp_path)
    config.model.backend, config.model.uno_mults = "auto", (1,)
    config.model.uno_blocks_per_level, config.model.uno_attn_resolutions = (1,), ()
    network = build_decoder(config).eval()
    values, t, z = torch.randn(2, 64, 3), torch.tensor([3, 500]), torch.randn(2, 6)

    def run(network, seed):
        coords = Coordinates.random(2, (16, 16), 64, generator=torch.Generator().manual_seed(seed))
        return network(values, t, z, coords)

    compiled = torch.compile(network, backend="eager")
    for seed in range(2):
        torch.testing.assert_close(run(compiled, seed), run(network, seed))


@pytest.mark.parametrize("script", ["train_inf_ae_diffusion", "experiments.report"])
def test_a_script_starts_without_the_compiler(script):
    done = subprocess.run([sys.executable, "-c", f"import sys, {script}; print('torch._dynamo' in sys.modules)"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
