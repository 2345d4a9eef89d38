from services.identityd.caution import SILENCE_S, Caution, Losses, Signs

REST_S = 300.0
QUIET = Signs(lost=0, references=1000, term=7, heard_s=0.0)


def signs(now_s, **fields):
    values = {"lost": 0, "references": 1000, "term": 7, "heard_s": now_s, **fields}
    return Signs(**values)


def test_collecting_rests_after_a_start():
    caution = Caution(REST_S, QUIET, 10.0)
    assert caution.left_s(10.0 + REST_S - 1) > 0
    assert caution.alarm(signs(400.0), 400.0) is None
    assert caution.left_s(400.0) <= 0


def test_each_sign_of_failure_suspends_and_says_why():
    for bad, words in (
        ({"term": 8}, "new leader"),
        ({"heard_s": 400.0 - SILENCE_S - 1}, "no heartbeat"),
        ({"lost": 300, "references": 700}, "300 of 1000 references"),
    ):
        caution = Caution(REST_S, QUIET, 0.0)
        assert words in caution.alarm(signs(400.0, **bad), 400.0)
        assert caution.left_s(500.0) == 200.0


def test_a_new_leader_is_noticed_once():
    caution = Caution(REST_S, QUIET, 0.0)
    assert caution.alarm(signs(400.0, term=8), 400.0)
    assert caution.alarm(signs(401.0, term=8), 401.0) is None


def test_ordinary_scaling_down_does_not_suspend():
    caution = Caution(REST_S, QUIET, 0.0)
    assert caution.alarm(signs(400.0, lost=50, references=10), 400.0) is None
    assert caution.alarm(signs(400.0, lost=190, references=810), 400.0) is None


def test_losses_count_those_of_the_last_minute_only():
    losses = Losses()
    for second in range(0, 600, 10):
        losses.add(5, float(second))
    assert losses.lately(590.0) == 35
    assert losses.lately(700.0) == 0
