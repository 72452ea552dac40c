import logging

from experiments.runtime import progress


def test_a_job_log_gets_sparse_lines_with_rate_time_left_and_note(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="medfuncta"), progress.Progress("train", total=100, unit="steps") as bar:
        for _ in range(65):
            now[0] += 1
            bar.advance(note="PSNR 30.00 dB")
        bar.message("validated")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "train: 31 of 100 steps, 1 a second, 1 min 9 s left, PSNR 30.00 dB"
    assert len(lines) == 3
    assert lines[-1] == "validated"


def test_a_sign_of_life_between_two_that_are_done(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="medfuncta"), progress.Progress("classify", total=2, unit="fits") as bar:
        now[0] += 31
        bar.advance(0, note="epoch 1 of 9")
    assert [record.getMessage() for record in caplog.records] == [
        "classify: 0 of 2 fits, 0 a second, unknown time left, epoch 1 of 9"
    ]


def test_slow_work_is_told_in_seconds_each():
    assert progress._pace(0.05) == "20 s each"
    assert progress._duration(3725) == "1 h 2 min"
    assert progress._duration(12) == "12 s"
