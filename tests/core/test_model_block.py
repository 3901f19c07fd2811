"""A block as algorithms see it, against the module itself with weights written into it."""

from __future__ import annotations

import copy

import pytest
import torch

from autoround_core.adapter import BlockView, LinearSite
from autoround_core.calibration_set import CalibrationSet
from autoround_core.capture import capture
from autoround_core.causal_lm import CausalLM
from autoround_core.compute import Compute
from autoround_core.int_family import IntFamily
from autoround_core.model_block import ModelBlock
from autoround_core.scheme import QuantScheme
from tiny_models import MIXTURES, MODELS, token_ids

CPU = torch.device("cpu")
SCHEME = QuantScheme(4, 32)
IDS = token_ids(samples=4, length=16)
ROWS = torch.tensor([2, 0, 3])


class Case:
    """One block of a model, as ModelBlock and as the module it is made of."""

    def __init__(self, path, index: int = -1, *, dtype=torch.float32, compute=torch.float32, keep=()) -> None:
        adapter = CausalLM()
        self.model = adapter.load(path, trust_remote_code=False).to(dtype)
        view = adapter.view(self.model)
        self.block: BlockView = view.blocks[index]
        chain = capture(view, CalibrationSet(IDS, "given", len(IDS), 0))
        first, self.call = chain.hidden, chain.calls[index]
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(first.shape, generator=generator).to(dtype)
        self.original = torch.randn(first.shape, generator=generator).to(dtype)
        schemes = {site.name: SCHEME for site in self.block.sites if site.name not in keep}
        self.tuned = ModelBlock(
            self.block.name, self.block.module, self.block.sites, self.call, schemes=schemes,
            families=dict.fromkeys(schemes, IntFamily()), compute=Compute(CPU, CPU, compute, batch_size=2),
        )
        self.tuned.set_chains(self.original, self.hidden, targets_given=False)

    def twin(self, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        """A copy of the module with `weights` written into it."""
        module = copy.deepcopy(self.block.module)
        with torch.no_grad():
            for site in self.block.sites:
                if site.name in weights:
                    site.read(parameter(module, self.block, site)).copy_(weights[site.name])
        return module

    @torch.no_grad()
    def run(self, module: torch.nn.Module, hidden: torch.Tensor, rows=ROWS) -> torch.Tensor:
        return torch.cat([self.call.run(module, hidden[row][None], row[None]) for row in rows])


def parameter(module: torch.nn.Module, block: BlockView, site: LinearSite) -> torch.Tensor:
    return module.get_parameter(site.path.removeprefix(f"{block.name}."))


def changed(weights) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: (weight + 0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
            for name, weight in weights.items()}


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_module_with_the_weights_written_into_it(saved, name):
    case = Case(saved(name))
    weights = changed(case.tuned.weights)
    expected = case.run(case.twin(weights), case.hidden)
    torch.testing.assert_close(case.tuned.forward(weights, ROWS), expected, rtol=1e-4, atol=1e-4)
    expected = case.run(case.block.module, case.original)
    torch.testing.assert_close(case.tuned.target(ROWS), expected, rtol=1e-4, atol=1e-4)
    # a layer left out keeps its own weight
    some = dict(list(weights.items())[::2])
    torch.testing.assert_close(
        case.tuned.forward(some, ROWS), case.run(case.twin(some), case.hidden), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_bfloat16_model_runs_in_both_precisions(saved, name, compute):
    case = Case(saved(name), dtype=torch.bfloat16, compute=compute)
    precise = Case(saved(name), dtype=torch.float32)
    precise.tuned.set_chains(case.original.float(), case.hidden.float(), targets_given=False)
    weights = changed(case.tuned.weights)
    expected = precise.tuned.forward({name: weight.float() for name, weight in weights.items()}, ROWS)
    actual = case.tuned.forward(weights, ROWS)
    error = (actual - expected).norm() / expected.norm()
    # errors stay in float32 in both; with states and products in bfloat16 a token may choose another expert
    limit = 2e-2 if compute == torch.float32 else 0.2 if name in MIXTURES else 0.04
    assert actual.dtype == torch.float32 and error < limit


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_error(saved, name):
    case = Case(saved(name))
    weights = {name: weight.clone().requires_grad_() for name, weight in changed(case.tuned.weights).items()}
    loss = torch.nn.functional.mse_loss(case.tuned.forward(weights, ROWS), case.tuned.target(ROWS))
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    truth = {name: part for name, part in zip(weights, gradients, strict=True) if part is not None}
    plain = {name: weight.detach() for name, weight in weights.items()}
    found = case.tuned.gradients(plain, ROWS)
    assert found.keys() == truth.keys()
    # the loss may be scaled, alike for all
    scale = next(found[name].norm() / part.norm() for name, part in truth.items() if part.norm() > 0)
    for name, part in truth.items():
        torch.testing.assert_close(found[name] / scale, part, rtol=1e-3, atol=1e-6)
    assert case.tuned.error(plain, ROWS) == pytest.approx(float(loss.detach()), rel=1e-4)
    idle = set(weights) - found.keys()
    assert all(".experts." in name for name in idle), "only what no token reached is without a gradient"
    assert len(idle) < len(weights) / 2


@pytest.mark.parametrize("name", MODELS)
def test_write_back_changes_the_module_and_nothing_else(saved, name):
    case = Case(saved(name))
    weights = changed(case.tuned.weights)
    before = {path: tensor.clone() for path, tensor in case.block.module.state_dict().items()}
    expected = case.run(case.twin(weights), case.hidden, torch.arange(4))
    case.tuned.write_back(weights)
    for site in case.block.sites:
        assert torch.equal(site.read(parameter(case.block.module, case.block, site)), weights[site.name])
    paths = {site.path.removeprefix(f"{case.block.name}.") for site in case.block.sites}
    after = case.block.module.state_dict()
    assert all(torch.equal(before[path], after[path]) for path in before.keys() - paths)
    # and the chain goes on with the new weights, in place
    assert case.tuned.advance(case.hidden) is case.hidden
    torch.testing.assert_close(case.hidden, expected, rtol=1e-4, atol=1e-4)


def test_the_module_is_untouched_while_weights_stand_in(saved):
    case = Case(saved("mixtral"))
    before = {path: tensor.clone() for path, tensor in case.block.module.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in case.block.module.named_modules()}
    case.tuned.gradients(changed(case.tuned.weights), ROWS)
    assert all(torch.equal(tensor, before[path]) for path, tensor in case.block.module.state_dict().items())
    assert attributes == {path: set(vars(module)) for path, module in case.block.module.named_modules()}
    assert all(parameter.grad is None for parameter in case.block.module.parameters())


def test_given_targets_are_handed_out_as_they_are(saved):
    case = Case(saved("llama"), dtype=torch.bfloat16, compute=torch.bfloat16)
    case.tuned.set_chains(case.original, case.hidden, targets_given=True)
    assert torch.equal(case.tuned.target(ROWS), case.original[ROWS].float())


# --- importance ---------------------------------------------------------------------------------------------


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """What enters each layer [tokens, in], by layer: by hook, and for experts by their definition."""
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in case.block.sites}

    def keep(name: str, inputs: torch.Tensor) -> None:
        seen[name].append(inputs.reshape(-1, inputs.shape[-1]))

    def on_experts(module, args, sites):
        states, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for site in sites:
            mine = states[(chosen == site.expert).any(-1)]
            if site.parameter == "down_proj":
                gate, up = (mine @ module.gate_up_proj[site.expert].T).chunk(2, -1)
                mine = torch.nn.functional.silu(gate) * up
            keep(site.name, mine)

    handles = []
    for path in dict.fromkeys(site.module for site in case.block.sites):
        module = case.model.get_submodule(path)
        sites = [site for site in case.block.sites if site.module == path]
        if sites[0].expert is None:
            hook = lambda _, args, site=sites[0]: keep(site.name, args[0])  # noqa: E731
        else:
            hook = lambda module, args, sites=sites: on_experts(module, args, sites)  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    case.run(case.block.module, case.hidden, torch.arange(4))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("name", MODELS)
def test_input_mean_square_is_that_of_what_enters_each_layer(saved, name):
    case = Case(saved(name))
    found, truth = case.tuned.input_mean_square(), inputs_of(case)
    assert found.keys() == truth.keys()
    for layer, inputs in truth.items():
        expected = inputs.square().mean(0) if len(inputs) else torch.zeros(inputs.shape[1])
        torch.testing.assert_close(found[layer], expected, rtol=1e-3, atol=1e-5)
    if name in MIXTURES:
        assert len({len(inputs) for layer, inputs in truth.items() if ".experts." in layer}) > 1


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_input_mean_square_of_a_bfloat16_mixture(saved, compute):
    case = Case(saved("qwen3_moe"), dtype=torch.bfloat16, compute=compute)
    precise = Case(saved("qwen3_moe"))
    precise.tuned.set_chains(case.original.float(), case.hidden.float(), targets_given=False)
    found, truth = case.tuned.input_mean_square(), precise.tuned.input_mean_square()
    assert all(found[name].dtype == torch.float32 for name in found)
    # in bfloat16 a token may choose another expert
    close = [name for name in truth if (found[name] - truth[name]).norm() < 0.05 * truth[name].norm()]
    assert len(close) > (0.7 if compute == torch.bfloat16 else 0.999) * len(truth)


# --- experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_stays_in_16_bits_keeps_its_weight(saved, name):
    untouched = Case(saved(name))
    names = [site.name for site in untouched.block.sites if ".experts.2." in site.name]
    assert len(names) == 3
    case = Case(saved(name), keep=names[:2])  # one of gate and up, and down
    assert set(case.tuned.weights) == {site.name for site in case.block.sites} - set(names[:2])
    weights = changed(case.tuned.weights)
    torch.testing.assert_close(
        case.tuned.forward(weights, ROWS), case.run(case.twin(weights), case.hidden), rtol=1e-4, atol=1e-4
    )
    assert set(case.tuned.gradients(weights, ROWS)) <= set(weights)
    assert set(case.tuned.input_mean_square()) == set(weights)
    case.tuned.write_back(weights)
    site = next(site for site in case.block.sites if site.name == names[0])
    kept = site.read(parameter(case.block.module, case.block, site))
    assert torch.equal(kept, untouched.tuned.weights[names[0]])


def test_no_gradient_of_all_experts_at_once_is_made(saved):
    case = Case(saved("mixtral"))
    weights = {name: weight.clone().requires_grad_() for name, weight in case.tuned.weights.items()}
    names, nodes = set(), [case.tuned.forward(weights, ROWS).grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "CatBackward0" in names and "StackBackward0" not in names


def test_padding_counts_for_nothing(saved):
    """Whatever stands in padded places, in states or targets, errors, gradients and statistics are the same."""
    case = Case(saved("llama"))
    mask = torch.ones(len(IDS), 16, dtype=torch.bool)
    mask[0, 10:], mask[2, 3:] = False, False  # on the right, where causal attention hides it from the rest
    results = []
    for noise in (0.0, 5.0):
        block = ModelBlock(
            case.block.name, case.block.module, case.block.sites, case.call, schemes=case.tuned.schemes,
            families=case.tuned.families, compute=Compute(CPU, CPU, torch.float32, batch_size=2), mask=mask,
        )
        filled = [torch.where(mask[..., None], states, states + noise) for states in (case.original, case.hidden)]
        block.set_chains(*filled, targets_given=True)
        weights = {name: weight * 0.9 for name, weight in block.weights.items()}
        results.append((block.error(weights, ROWS), block.gradients(weights, ROWS), block.input_mean_square()))
    (error, gradients, squares), (other_error, other_gradients, other_squares) = results
    assert error == pytest.approx(other_error)
    for name in gradients:
        torch.testing.assert_close(gradients[name], other_gradients[name])
        torch.testing.assert_close(squares[name], other_squares[name])
    # by hand: the mean over what is no padding
    output = block.forward(weights, ROWS)
    valid = mask[ROWS]
    expected = (output[valid] - block.target(ROWS)[valid]).square().mean()
    assert error == pytest.approx(float(expected), rel=1e-4)
