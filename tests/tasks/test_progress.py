"""What a person reads while a run trains."""

from tasks.launch.status import TrainingProgress, sentence

LINE = {"step": 30, "loss": 1.23456, "learning_rate": 3e-4, "tokens_per_second": 1234.5, "share": 0.25, "seconds": 40.0}


def test_a_line_says_how_far_how_good_how_fast_and_how_long():
    assert sentence("sft", LINE) == "sft step 30, loss 1.235, learning rate 0.0003, 1234 tokens/s, 25%, 2:00 left"
    assert sentence("sft", {"step": 4, "event": "rolled back"}) == "sft step 4, rolled back"


def test_a_log_gets_few_training_lines_but_every_event_and_the_last(capsys):
    show = TrainingProgress("sft")
    for line in (
        LINE,
        LINE,
        {"step": 30, "event": "resumed"},
        {"step": 30, "validation_nll": 0.5},
        LINE | {"share": 1.0},
    ):
        show(line)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 4
    assert shown[2] == "sft step 30, validation nll 0.5"
