"""Bayesian teaching, the exact parts and the protocol: the Assistant against brute force and against values of another program, its limits, and the
whole path through text, servers and interruptions, for chats whose answers are known."""
import json
import numpy as np
import pytest
from rlcr_suite.bayes_teaching.assistant import Assistant, remaining
from rlcr_suite.bayes_teaching.dialogue import AssistantChat, Talk, interact, opening, option_logprobs, parse_choice
from rlcr_suite.bayes_teaching.measures import accuracy, advice, agreement, beliefs, calibration, gain, probabilities, rate, updates
from rlcr_suite.bayes_teaching.results import AFTER_FIVE, GOLDEN, after_five, golden
from rlcr_suite.bayes_teaching.world import STYLES, WEIGHTS, FlightWorld, HotelWorld, ShopWorld, choice_logprobs, drifting, first, read, tell, top, words
from rlcr_suite.core.chat import ChatError, LocalChat, Reply, ScriptedServer, ServerChat

@pytest.fixture(scope="module")
def world(): return FlightWorld()

def own_sets(world, n, rounds, seed): return world.sets(n*rounds, seed).reshape(n, rounds, 3, -1)

def follow(world, users, sets, **kwargs):
    "The Assistant after all rounds of perfect users"
    a = Assistant(world, **kwargs)
    for t in range(sets.shape[1]): a.update(sets[:, t], world.choice(sets[:, t], users))
    return a

# ---------------------------------------------------------------------------------------------------------------- the Assistant

@pytest.mark.parametrize("rule", GOLDEN)
def test_values_of_another_program(world, rule):
    "Which is tolerant of ties, and drew five sets for all users, three times: a mean of three such draws has a standard error of .008 after five rounds"
    many = world.sets(1000, 12)                                            # before any choice all users are advised alike: more sets, less chance
    got = np.mean(golden(rule, 2), 0)
    got[0] = (Assistant(world).predict(many, rule) == world.choice(many[:, None], world.users()).T).mean()
    assert np.abs(got - GOLDEN[rule]).max() < .01

def test_ties(world):
    "Any of equals: the paper's 27 users left. The first of equals: fewer, and always among them. One user's by elimination: the same"
    W, sets = world.users(), own_sets(world, 624, 5, 11)
    any_, first_ = (follow(world, W, sets, ties=t) for t in ("any", "first"))
    se = any_.left.std()/624**.5
    assert abs(any_.left.mean() - 27) < .5 + 2*se and first_.left.mean() < any_.left.mean() - 2*se   # "about 27": rounded, and two standard errors
    assert not ((first_.posterior > 1e-6) & (any_.posterior < 1e-6)).any()
    left = remaining(world, sets[5], world.choice(sets[5], W[5]))
    np.testing.assert_allclose(left.mean(0), any_.mean[5], atol=1e-6)
    with pytest.raises(ValueError, match="ties must be"): Assistant(world, ties="last")

@pytest.mark.parametrize("name, n", (("flight-2", 400), ("flight-5", 300), ("flight-8", 60), ("hotel", 300)))
def test_other_domains(name, n):
    "Two standard errors of the other program's three draws (.01, as page 02 finds) and of ours"
    got = after_five(name, 2, n)
    assert abs(got.mean() - AFTER_FIVE[name]) < 2*(.01**2 + .16/n/2)**.5

def test_users_are_drawn_evenly(world):
    users = world.sample_users(6240 + 7)
    _, counts = np.unique(users, axis=0, return_counts=True)
    assert sorted(counts)[-8:] == [10] + 7*[11] and len(counts) == 624
    assert (world.sample_users(9, 4) == world.sample_users(9, 4)).all() and len(np.unique(world.sample_users(624, 1), axis=0)) == 624

def test_by_brute_force():
    "Noise, drift and ties at once, by loops over hypotheses and paths of tastes"
    w, tau, d = FlightWorld(2), .3, .2
    V, sets, said = w.users(), w.sets(3, 5), (2, 0, 1)
    like = [np.array([np.exp(choice_logprobs(w.reward(s, v), tau))[c] for v in V]) for s, c in zip(sets, said)]
    kernel = np.array([[np.prod([(1 - d)*(a == b) + d/5 for a, b in zip(u, v)]) for v in V] for u in V])
    kernel /= kernel.sum(1, keepdims=True)
    path = np.einsum("i,ij,j,jk,k->k", like[0], kernel, like[1], kernel, like[2])
    a = Assistant(w, noise=tau, drift=d)
    for s, c in zip(sets, said): a.update(s, c)
    np.testing.assert_allclose(a.posterior[0], path/path.sum(), rtol=1e-9)
    share = sum(p*np.eye(3)[w.choice(sets, v)] for p, v in zip(a.posterior[0], V))
    np.testing.assert_allclose(a.predictive(sets)[0], share, atol=1e-12)
    np.testing.assert_array_equal(a.predict(sets, "mean")[0], w.choice(sets, a.mean))

def test_batches_and_order(world):
    "Users of a batch do not touch each other, and without drift the order of rounds does not matter"
    users, sets = world.sample_users(7, 2), own_sets(world, 7, 4, 3)
    a, b = follow(world, users, sets, noise=.2), follow(world, users, sets[:, ::-1], noise=.2)
    np.testing.assert_allclose(a.posterior, b.posterior, atol=1e-12)
    np.testing.assert_allclose(follow(world, users[4:5], sets[4:5], noise=.2).posterior[0], a.posterior[4], atol=1e-12)
    assert abs(follow(world, users, sets, drift=.2).posterior - follow(world, users, sets[:, ::-1], drift=.2).posterior).max() > .01
    held = own_sets(world, 7, 5, 9)                                        # sets of one's own, against one user at a time
    one = [follow(world, users[[i]], sets[[i]], noise=.2).predictive(held[i])[0] for i in range(7)]
    np.testing.assert_allclose(a.predictive(held), one, atol=1e-12)

def test_truth_is_never_lost(world):
    "Ties: a strict rule loses users, the Assistant none, in any order of summation"
    W, sets = world.users(), world.sets(8, 0)
    a, named = Assistant(world), first(world.reward(sets[:, None], W))
    backwards = first(sum((world.phi(sets)[..., [j]]*W[:, j] for j in (3, 2, 1, 0))).swapaxes(1, 2))
    for s, c in zip(sets, backwards): a.update(s, c)
    np.testing.assert_array_equal(named, backwards)
    assert (a.posterior[np.diag_indices(624)] >= .999/a.left).all()
    unique = top(world.reward(sets[:, None], W)).sum(-1) == 1
    assert not unique.all(0).all()

def test_contradiction_leaves_the_least_contradicted(world):
    s = world.sets(2, 1)
    a = Assistant(world).update(s[0], 0).update(s[0], 1).update(s[0], 1).update(s[1], 2)
    fits = (world.choice(s[0], world.users()[:, None])[:, 0] == 1) & (world.choice(s[1], world.users()[:, None])[:, 0] == 2)
    assert fits.any() and a.left[0] == fits.sum() and a.posterior[0, fits].sum() > 1 - 1e-6

def test_sampling_follows_the_posterior(world):
    a, s = follow(world, world.users()[[50]], world.sets(2, 4)[None]), world.sets(1, 6)
    drawn = a.predict(np.repeat(s, 20_000, 0), "sample", seed=1)[0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=3)/20_000, a.predictive(s)[0, 0], atol=.015)
    np.testing.assert_array_equal(drawn, a.predict(np.repeat(s, 20_000, 0), "sample", seed=1)[0])

def test_eight_features_fit():
    w = FlightWorld(8)
    a = follow(w, w.sample_users(2, 1), own_sets(w, 2, 3, 2))
    np.testing.assert_allclose(a.posterior.sum(1), 1)
    assert a.predictive(w.sets(20)).shape == (2, 20, 3) and a.marginals.shape == (2, 8, 5)

@pytest.mark.parametrize("call, says", ((lambda w: Assistant(w, noise=0.), "noise"), (lambda w: Assistant(w, drift=2.), "drift"), (lambda w: Assistant(w).update(w.sets(1)[0], -1), "0, 1 or 2"),
    (lambda w: Assistant(w).update(w.sets(2), [0, 1, 2]), "do not fit"), (lambda w: Assistant(w).predict(w.sets(1)[0]), "shape"), (lambda w: w.phi(np.zeros((3, 4))), "whole numbers"),
    (lambda w: w.phi(np.zeros((3, 3), int)), "4 features"), (lambda w: drifting(w.users(), 2, -1), "drift"), (lambda w: FlightWorld(1), "2 to 8"), (lambda w: ShopWorld(100), "categories")))
def test_refusals(world, call, says):
    with pytest.raises(ValueError, match=says): call(world)

# ---------------------------------------------------------------------------------------------------------------- the conversation

@pytest.mark.parametrize("style", STYLES)
def test_every_level_can_be_told_and_read(style):
    for w in (FlightWorld(8), HotelWorld(), *(ShopWorld(c) for c in range(0, 100, 9))):
        levels = max(len(f.texts) for f in w.features)
        for l in range(levels):
            o = np.array([min(l, len(f.texts) - 1) for f in w.features])
            np.testing.assert_array_equal(read(w, tell(w, o, style), style), o)

def test_feedback_answers_what_was_said(world):
    "The same reply to every question: the user's words follow it, and the next question comes with them"
    class Stubborn:
        def generate(self, messages, n=1, max_tokens=256, temperature=1., seed=None, stop=None):
            assert messages[-1]["role"] == "user" and [m["role"] for m in messages[::2]] == ["user"]*(len(messages)//2 + 1)
            return ["I am sure it is Flight 2"]*n
        def logprobs(self, messages, options): raise AssertionError("not asked for")
    s = interact(Stubborn(), world, world.sample_users(5, 1), held_out=2)
    assert (s.said == 1).all() and (s.held_said == 1).all() and (s.choices != 1).any()
    for talk, choices in zip(s.talks, s.choices):
        heard = [m["content"].split("\n")[0] for m in talk.messages[2::2]] + [talk.said_next]
        assert heard == ["Flight 2 is correct." if c == 1 else f"Flight 2 is incorrect. I prefer Flight {c + 1}." for c in choices]
        assert len(talk.messages) == 10                                    # held-out questions leave no trace

def test_the_assistant_through_a_server_that_fails(world, tmp_path):
    "Interrupted by a dead server, taken up again, and equal to the Assistant on arrays"
    reader, alive = AssistantChat(world, "terse"), [37]
    def reply(request):
        alive[0] -= 1
        return reader.generate(request["messages"])[0] if alive[0] >= 0 else Reply("", status=500)
    users = world.sample_users(6, 4)
    with ScriptedServer(reply) as server, ServerChat("m", server.base_url, max_retries=0, concurrency=1) as chat:
        run = lambda: interact(chat, world, users, rounds=3, held_out=3, style="terse", path=tmp_path/"run.jsonl", batch=6)
        with pytest.raises(ChatError): run()
        kept, alive[0] = len((tmp_path/"run.jsonl").read_text().splitlines()), 10_000
        asked = len(server.requests)
        s = run()
    assert kept == 6 and len(server.requests) - asked == 6*(4*3 + 3) - 6*kept
    np.testing.assert_array_equal(s.held_said, advice(s)[0])
    assert s.table().shape == (6*(3 + 4*3), 7) and not s.table().loc[s.table().said != s.table().choice, "correct"].any()

def test_drifting_and_noisy_users(world):
    tastes = drifting(world.sample_users(30, 1), 4, .3, seed=2)
    s = interact(AssistantChat(world, noise=.2, drift=.3), world, tastes, rounds=4, held_out=4, noise=.2)
    for t in range(5): np.testing.assert_array_equal(s.held_choices[:, t], world.choice(s.held, tastes[:, max(t - 1, 0), None]))
    np.testing.assert_array_equal(s.held_said, advice(s, noise=.2, drift=.3)[0])
    assert (s.choices != world.choice(s.sets, tastes)).any()               # they err in the rounds

def test_a_model_in_this_process():
    "Groups of unequal size with a shared beginning, one and several tokens, against scores that share nothing"
    from rlcr_suite.core.lm import tiny_lm, word_tokenizer
    w = FlightWorld(3)
    levels = [x for f in w.features for x in words(f, "terse")]
    tok = word_tokenizer([opening(w, "terse"), "correct incorrect no answer", *levels, *map(str.upper, levels)])
    chat = LocalChat(tiny_lm(tok, hidden_size=16, layers=2, heads=2, intermediate_size=32, max_length=200, initializer_range=.3), tok, batch_size=8)
    talks = [Talk(w, "terse") for _ in range(3)]
    for i, t in enumerate(talks):
        for s in w.sets(i, 7): t.hear(s, "2", 0)
    groups = [[t.ask(s) for s in w.sets(n, 9)] for t, n in zip(talks, (4, 1, 2))]
    for options in (list("123"), ["1", "no answer"]):                      # the second has an option of two tokens
        for got, g in zip(option_logprobs(chat, groups, options), groups, strict=True):
            np.testing.assert_allclose(got, [chat.logprobs(m, options) for m in g], atol=1e-4)
    assert tok.unk_token_id not in tok(groups[2][0][-1]["content"])["input_ids"]
    s = interact(chat, w, w.sample_users(3, 1), rounds=2, held_out=4, style="terse", decide="logprobs")
    np.testing.assert_array_equal(s.held_said, s.held_logprobs.argmax(-1))
    np.testing.assert_allclose(probabilities(s).sum(-1), 1)
    assert np.ptp(s.held_logprobs) > .1                                    # the model tells options apart

@pytest.mark.parametrize("text, want", (("2", 1), ("\n**Flight 3**", 2), ("Flight 1 or Flight 2", None), ("<think>Flight 1</think> Flight 2", 1), ("I pick Flight 3 over Flight 1.", 2), ("not Flight 1", None),
                                        ("4", None), ("23", None), ("2.5", None), ("", None), ("Flight 2" + " and so on"*50_000, 1)))
def test_replies(text, want): assert parse_choice(text, "flight") == want

# ---------------------------------------------------------------------------------------------------------------- measures

@pytest.fixture(scope="module")
def session(world):
    chat = AssistantChat(world, noise=.15)
    return chat, interact(chat, world, world.sample_users(24, 3), rounds=3, held_out=10, noise=.15, decide="logprobs")

@pytest.mark.parametrize("power", (.5, 2.))
def test_slope_of_a_known_fault(session, power):
    p = .8*probabilities(session[1]) + .2/3
    q = p**power/(p**power).sum(-1, keepdims=True)
    u = updates(q, p, floor=1e-9, n_boot=50)
    assert abs(u.slope.value - power) < 1e-9 and abs(u.direction.value - 1) < 1e-9 and abs(u.slope.value - u.direction.value*u.size.value) < 1e-9
    assert abs(updates(q[:, ::-1], p, n_boot=50).direction.value) < .99     # the same moves backwards are not the same

def test_measures_of_the_exact_adviser(session, world):
    chat, s = session
    named, p = advice(s, noise=.15, rule="vote")
    assert [x.value for x in agreement(s, named, n_boot=50)] == [1.]*4
    np.testing.assert_allclose(probabilities(s), p, atol=1e-9)
    assert gain(s, 0, n_boot=200).low > 0 and accuracy(s, n_boot=50)[0].n == 24
    truth = beliefs(s, 3 + 2*world.sample_users(24, 3), world.sample_users(24, 3), n_boot=50)
    assert truth["accuracy"].value == 1 and truth["error"].value == 0
    ratings = rate(chat, s)
    np.testing.assert_array_equal(ratings, np.rint(3 + 2*follow_session(s, world).mean))
    assert 0 <= calibration(p, s, 3, n_boot=20)["ece"].value < .2

def follow_session(s, world):
    a = Assistant(world, noise=.15)
    for t in range(s.sets.shape[1]): a.update(s.sets[:, t], s.choices[:, t])
    return a

# ---------------------------------------------------------------------------------------------------------------- play

def test_games(world, tmp_path):
    play = pytest.importorskip("rlcr_suite.core.play")
    from rich.console import Console
    from rlcr_suite.bayes_teaching.play import AssistantGame, UserGame
    lines = iter(["no", "2", "Flight 1", "3"])
    game = UserGame(world, rounds=3, seed=3)
    with open(tmp_path/"screen", "w") as f: assert play.terminal(game, tmp_path/"moves.jsonl", Console(file=f, width=200), lambda: next(lines))
    rows = [json.loads(l) for l in (tmp_path/"moves.jsonl").read_text().splitlines()]
    assert [r["preferred"] for r in rows] == [1, 0, 2] and rows == game.rows
    a = Assistant(world, noise=.1)
    for r in rows:
        assert r["advised"] == a.predict(np.array([r["options"]]), "vote")[0, 0]  # what was advised knew nothing of this round's choice
        a.update(np.array(r["options"]), r["preferred"])
    np.testing.assert_allclose([p.values for p in game.panels()], a.marginals[0])
    game = AssistantGame(HotelWorld(), rounds=2, seed=5, hints=False)
    game.move("1")
    assert game.panels() == []
    game.move("1")
    assert [WEIGHTS[p.mark] for p in game.panels()] == game.user.tolist() and game.ask() == ""
    with pytest.raises(ValueError, match="over"): game.move("1")

def test_the_same_game_in_a_notebook(world):
    play, w = pytest.importorskip("rlcr_suite.core.play"), pytest.importorskip("ipywidgets")
    from rlcr_suite.bayes_teaching.play import UserGame
    game = UserGame(world, rounds=2, seed=3)
    box = play.widget(game)
    def buttons(x): return [x] if isinstance(x, w.Button) else [b for c in getattr(x, "children", ()) for b in buttons(c)]
    for option in ("Flight 3", "Flight 1"): next(b for b in buttons(box) if b.description == option).click()
    assert [r["preferred"] for r in game.rows] == [2, 0] and not buttons(box)
