import pytest
import torch
import torch.multiprocessing as mp

from repa.alignment import LOSSES
from repa.base import dist
from repa.base.errors import UserError
from tests.oracles import alignment as oracle


def pair(n=4, tokens=9, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, width, generator=g), torch.randn(n, tokens, width, generator=g) * 7 + 1


def test_cosine_equals_the_double_loop():
    a, b = pair()
    assert torch.allclose(LOSSES.build("cosine")(a, b).double(), torch.tensor(oracle.cosine(a, b)).double(), atol=1e-6)


def test_cosine_is_lowest_for_parallel_tokens_of_any_length():
    a, _ = pair()
    cosine = LOSSES.build("cosine")
    assert torch.allclose(cosine(a, 3 * a), -torch.ones(4), atol=1e-6)
    assert torch.allclose(cosine(a, -a), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_equals_the_loop(temperature):
    a, b = pair()
    b = a + 0.5 * b
    got = LOSSES.build(f"nt_xent:temperature={temperature}")(a, b)
    assert torch.allclose(got.double(), torch.tensor(oracle.nt_xent(a, b, temperature)).double(), rtol=1e-4, atol=1e-5)


def test_nt_xent_anchors_are_the_projected_tokens():
    """The loss is asymmetric, so swapping student and teacher must change it."""
    a, b = pair()
    nt_xent = LOSSES.build("nt_xent")
    assert not torch.allclose(nt_xent(a, b), nt_xent(b, a), rtol=1e-2)


def test_nt_xent_of_indistinct_images_is_log_n():
    a = torch.ones(5, 4, 3)
    assert torch.allclose(LOSSES.build("nt_xent")(a, a), torch.full((5,), 5.0).log())


def test_nt_xent_negatives_are_the_same_position_of_other_images():
    a, b = pair()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    nt_xent = LOSSES.build("nt_xent")
    assert torch.allclose(nt_xent(a[:, order], b[:, order]), nt_xent(a, b), atol=1e-5)
    grad = torch.autograd.functional.jacobian(lambda y: nt_xent(a, y)[0], b)  # (N, T, F)
    changed = torch.autograd.functional.jacobian(lambda y: nt_xent(a[:, :1], y[:, :1])[0], b)
    assert (grad[1:] != 0).any(-1).all()
    assert (changed[:, 1:] == 0).all()


@pytest.mark.parametrize("name", ["cosine", "nt_xent"])
def test_gradient_equals_finite_differences(name):
    a, b = pair(n=3, tokens=2, width=3)
    a.requires_grad_()
    similarity = LOSSES.build(name if name == "cosine" else "nt_xent:temperature=0.5")
    similarity(a, b).sum().backward()
    reference = oracle.cosine if name == "cosine" else lambda x, y: oracle.nt_xent(x, y, 0.5)
    for index in [(0, 0, 0), (1, 1, 2), (2, 0, 1)]:
        up, down = a.detach().double().clone(), a.detach().double().clone()
        up[index] += 1e-5
        down[index] -= 1e-5
        slope = (sum(reference(up, b)) - sum(reference(down, b))) / 2e-5
        assert a.grad[index].item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("name", ["cosine", "nt_xent"])
def test_huge_and_zero_half_precision_tokens_give_finite_losses_and_gradients(name):
    a, b = pair()
    a, b = a.half(), b.half()
    a[1, 1], b[2, 2], b[3, 3] = 6e4, 0, 6e4
    a.requires_grad_()
    loss = LOSSES.build(name)(a, b)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert a.grad.isfinite().all()
    assert LOSSES.build(name)(torch.zeros_like(a), b).isfinite().all()


@pytest.mark.parametrize("temperature", ["0", "-1.0", "warm"])
def test_nt_xent_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(UserError, match="'temperature' of the loss .* is "):
        LOSSES.build(f"nt_xent:temperature={temperature}")


def test_nt_xent_refuses_a_batch_without_negatives():
    with pytest.raises(UserError, match="needs at least 2, but got 1"):
        LOSSES.build("nt_xent")(*pair(n=1))


ACROSS = ("nt_xent", "dispersive:temperature=1", "gram:scope=batch", "gram:scope=batch,norm=l1,margin=0.1")


def loss_and_gradient(spec, a, b):
    a = a.clone().requires_grad_()
    loss = LOSSES.build(spec)(a, None if spec.startswith("dispersive") else b)
    loss.mean().backward()
    return loss.detach(), a.grad


def rank_losses_and_gradients(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    a, b = (x[2 * rank : 2 * rank + 2] for x in pair())
    found = {}
    for spec in ACROSS:
        loss, gradient = loss_and_gradient(spec, a, b)
        found[spec] = loss, gradient / 2  # DDP averages gradients over the two processes
    torch.save(found, f"{folder}/{rank}.pt")
    dist.teardown()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    mp.spawn(rank_losses_and_gradients, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for spec in ACROSS:
        losses, gradients = zip(*(part[spec] for part in parts), strict=True)
        loss, gradient = loss_and_gradient(spec, *pair())
        torch.testing.assert_close(torch.cat(losses), loss, rtol=1e-5, atol=1e-5, msg=spec)
        torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-4, atol=1e-6, msg=spec)
