import torch

from softprompt.tasks.compare import Side, largest_difference, measure_peak_bytes, train_side_by_side


class Line(torch.nn.Module):
    """loss = mean((x * weight - 1)^2); forward writes its name into a log."""

    def __init__(self, name="", log=None, spare_floats=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.log, self.spare_floats = name, log, spare_floats

    @property
    def device(self):
        return self.weight.device

    def forward(self, x):
        if self.log is not None:
            self.log.append(self.name)
        spare = torch.empty(self.spare_floats)
        del spare
        return type("Output", (), {"loss": (x * self.weight - 1).square().mean()})


BATCHES = [{"x": torch.full((4,), 1.0 + i)} for i in range(12)]


def test_sides_take_turns_and_the_first_one_changes():
    log = []
    train_side_by_side([Side("a", Line("a", log)), Side("b", Line("b", log))], BATCHES[:3], learning_rate=0.1)
    assert "".join(log) == "abbaab"


def test_equal_models_have_equal_losses_and_one_time_each_step():
    sides = [Side("a", Line()), Side("b", Line())]
    done = []
    train_side_by_side(sides, BATCHES, learning_rate=0.1, progress=lambda: done.append(1))
    assert largest_difference(*sides) == 0.0
    assert [len(side.milliseconds) for side in sides] == [12, 12]
    assert len(done) == 12
    assert sides[0].losses[0] == 1.0


def test_training_is_adamw_with_a_linear_schedule():
    side, twin = Side("a", Line()), Line()
    train_side_by_side([side], BATCHES, learning_rate=0.1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for i, batch in enumerate(BATCHES):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 12)
        twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(side.model.weight, twin.weight)


def test_the_largest_difference_is_over_steps():
    first, second = Side("a", None, losses=[1.0, 2.0, 3.0]), Side("b", None, losses=[1.0, 2.5, 2.9])
    assert largest_difference(first, second) == 0.5


def test_the_median_leaves_the_first_steps_out():
    assert Side("a", None, milliseconds=[900.0, 800.0, 700.0, 3.0, 1.0, 2.0]).median_milliseconds == 2.0


def test_the_peak_counts_memory_that_is_freed_within_the_step():
    batch, spare = {"x": torch.ones(4)}, 250_000
    small, large = (measure_peak_bytes(Line(spare_floats=floats), batch) for floats in (0, spare))
    assert 0 < small < 10_000
    assert 4 * spare <= large <= 4 * spare + small


def test_measuring_the_peak_leaves_no_gradient_and_the_weights_alone():
    model = Line()
    measure_peak_bytes(model, {"x": torch.ones(4)})
    assert model.weight.grad is None
    assert model.weight.item() == 0.0
