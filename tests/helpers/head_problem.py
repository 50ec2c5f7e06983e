"""A small head with label rows, and what the tests of `linear_cross_entropy` measure on it."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
NAMES = ("hidden", "weight", "bias", "label_rows", "targets")


def problem(vocab_size=131, dtype=torch.float64, width=24, num_rows=20, bias=True, seed=0, device=DEVICE):
    """hidden, weight, bias, label_rows, targets: rows out of order and repeated, some targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, width), (vocab_size, width), (vocab_size,)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    label_rows = torch.tensor([3, 1, 1, 1, 0, 17, 19, 0, 0])
    targets = torch.randint(0, vocab_size, label_rows.shape, generator=generator)
    targets[[5, 7, 8]] = IGNORED
    return *tensors[:2], tensors[2] if bias else None, label_rows.to(device), targets.to(device)


def as_double(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def loss_and_gradients(function, hidden, weight, bias, label_rows, targets, **options):
    loss = function(hidden, weight, label_rows, targets, bias=bias, **options)
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), wanted)]


def largest_error(value, truth):
    """Largest error relative to the largest entry."""
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def count_launches(run):
    """Kernels, fills and copies that a GPU runs for `run`, which has run before."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
