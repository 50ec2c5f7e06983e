import pytest
from transformers import TrainerControl, TrainerState

from softprompt.tasks.callbacks import StopAtStepEnd


@pytest.mark.parametrize("requested", [False, True])
def test_a_request_saves_and_stops_at_the_end_of_the_step(requested):
    callback = StopAtStepEnd()
    callback.requested = requested
    control = callback.on_step_end(None, TrainerState(), TrainerControl())
    assert (control.should_save, control.should_training_stop) == (requested, requested)


@pytest.mark.parametrize(
    "requested, epoch, kept", [(True, 1.5, False), (True, 2.0, True), (False, 1.5, True)]
)
def test_only_a_whole_epoch_is_evaluated_after_a_request(requested, epoch, kept):
    callback = StopAtStepEnd()
    callback.requested = requested
    control = TrainerControl(should_evaluate=True, should_save=True, should_log=True)
    control = callback.on_epoch_end(None, TrainerState(epoch=epoch), control)
    assert (control.should_evaluate, control.should_save, control.should_log) == (kept, kept, kept)
