"""Rewards by name: of the built-in shapes, of models, of a server, and of one's own."""

import base64
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from test_shape_score import SCENE, WRONG
from tiny_judges import save_qwen2_vl
from tiny_towers import save_clip

from thinkclearly.data.shape_score import scene_score
from thinkclearly.data.shapes import OPERATIONS, random_edit
from thinkclearly.evaluation.benchmarks.towers import Clip
from thinkclearly.evaluation.benchmarks.vqa import VqaScorer
from thinkclearly.training.rewards import HttpScorer, load_rewards

PROMPTS = ["a dog", "a cat", "a dog"]


@pytest.fixture
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in PROMPTS]


def reward(name, **options):
    (function,) = load_rewards([name], **options).values()
    return function


# Of the built-in shapes


def test_shapes_rewards_what_is_shown_of_the_scene():
    drawn = [SCENE, *WRONG.values()]
    pictures = [scene.render(64) for scene in drawn]
    found = reward("shapes")(["words"] * len(drawn), pictures, scene=[SCENE.to_json()] * len(drawn), key=["k"])
    assert found[0] == 1
    assert found == [scene_score(picture, SCENE) for picture in pictures]


def test_a_record_without_a_scene_gets_no_reward(pictures):
    assert reward("shapes")(PROMPTS, pictures, scene=[None, SCENE.to_json(), None])[::2] == [None, None]
    assert reward("shape_edits")(PROMPTS, pictures, edit=[None] * 3) == [None] * 3


@pytest.fixture(scope="module")
def edits():
    return [random_edit(3, i, [], (operation,)) for operation in OPERATIONS for i in range(4)]


def test_an_edit_that_is_done_exactly_gets_one_and_doing_nothing_half(edits):
    words, texts = [edit.instruction for edit in edits], [edit.to_json() for edit in edits]
    sources, targets, _ = zip(*[edit.render(64) for edit in edits])
    assert reward("shape_edits")(words, list(targets), edit=texts) == [1.0] * len(edits)
    assert reward("shape_edits")(words, list(sources), edit=texts) == [0.5] * len(edits)


def test_an_edit_loses_its_share_of_the_pixels_that_should_have_stayed(edits):
    for edit in edits:
        _, target, mask = edit.render(64, 48)
        outside = np.asarray(mask) == 0
        pixels, change = np.array(target), np.zeros(outside.shape, bool)
        change[::2] = outside[::2]  # by one level: no eye would see it
        pixels[change, 0] ^= 1
        (found,) = reward("shape_edits")([edit.instruction], [Image.fromarray(pixels)], edit=[edit.to_json()])
        assert found == pytest.approx(1 - 0.5 * change.sum() / outside.sum())


def test_an_edit_that_changes_every_pixel_can_only_be_done():
    (edit,) = [random_edit(0, 7, [], ("background",))]
    edit = replace(edit, before=replace(edit.before, shapes=()), after=replace(edit.after, shapes=()))
    source, target, _ = edit.render(64)
    words, texts = [edit.instruction] * 2, [edit.to_json()] * 2
    assert reward("shape_edits")(words, [target, source], edit=texts) == [1.0, 0.5]


@pytest.mark.parametrize(("name", "column"), [("shapes", "scene"), ("shape_edits", "edit")])
def test_records_without_what_shapes_are_judged_by_are_refused(pictures, name, column):
    with pytest.raises(ValueError, match=f"reward {name} needs the column {column}"):
        reward(name)(PROMPTS, pictures, key=["a", "b", "c"])
    for text in ("no JSON", "[]", '{"background": {}}'):
        with pytest.raises(ValueError, match=f"prompt 'a dog': its {column} is not what"):
            reward(name)(PROMPTS, pictures, **{column: [text] * 3})


# Of models


def test_vqa_is_the_judges_own_score(tmp_path, pictures):
    judge = save_qwen2_vl(tmp_path)
    found = reward(f"vqa:{judge}")(prompts=PROMPTS, completions=pictures, scene=[None] * 3, score=[1, 2, 3])
    assert found == VqaScorer(judge, "cpu").score(PROMPTS, pictures)


def test_clip_is_the_cosine_of_words_and_picture(tmp_path, pictures):
    tower = save_clip(tmp_path)
    found = reward(f"clip:{tower}")(prompts=PROMPTS, completions=pictures)
    clip = Clip(tower)
    wanted = [float(clip.texts([p])[0] @ clip.images([picture])[0]) for p, picture in zip(PROMPTS, pictures)]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert len(set(found)) == 3


# Of a server


class Server(ThreadingHTTPServer):
    """A reward server whose score is a picture's mean level.

    `failures` are what it does first, `always` what it does then: a status, a text, or "slow" for silence.
    """

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.failures, self.always, self.asked = [], None, []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def next_failure(self):
        with self.lock:
            return self.failures.pop(0) if self.failures else self.always


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        failure = self.server.next_failure()
        if failure == "slow":
            return self.server.closing.wait(30)
        if isinstance(failure, int):
            return self.send_error(failure)
        picture = Image.open(io.BytesIO(base64.b64decode(body["tensorFeatures"]["images"]["byteValues"])))
        text = json.dumps({"success": True, "resultMap": {"scores": float(np.asarray(picture).mean())}})
        self.send_response(200)
        self.end_headers()
        self.wfile.write((failure or text).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


def test_a_server_scores_each_picture_with_its_prompt(server, pictures):
    found = reward(f"http:{server.url}")(prompts=PROMPTS, completions=pictures, url=["a column"] * 3)
    assert found == [np.asarray(picture).mean() for picture in pictures]
    captions = [body["tensorFeatures"]["captions"] for body in server.asked]
    assert sorted(c["stringValues"][0] for c in captions) == sorted(PROMPTS)
    assert all(body["features"] == {} and body["tensorFeatures"]["images"]["shapes"] == [1] for body in server.asked)


def test_many_pictures_come_back_in_order(server):
    pictures = [Image.new("RGB", (8, 8), (level, level, level)) for level in range(40)]
    assert HttpScorer(server.url).score(["x"] * 40, pictures) == list(range(40))


@pytest.mark.parametrize("failure", [503, "no JSON", '{"success": false}', "slow"])
def test_a_server_that_fails_twice_is_asked_again(server, pictures, failure):
    server.failures = [failure] * 2
    scorer = HttpScorer(server.url, tries=3, wait=0.01, timeout=0.5 if failure == "slow" else 60)
    assert scorer.score(PROMPTS[:1], pictures[:1]) == [np.asarray(pictures[0]).mean()]
    assert len(server.asked) == 3


MALFORMED = [
    "no JSON",
    "[]",
    '{"success": true}',
    '{"success": false, "resultMap": {"scores": 0.5}}',
    '{"success": true, "resultMap": {"scores": null}}',
    '{"success": true, "resultMap": {"scores": [0.1, 0.2]}}',
    '{"success": true, "resultMap": {"scores": NaN}}',
    '{"success": true, "resultMap": {"scores": true}}',
]


@pytest.mark.parametrize("failure", [500, "slow", *MALFORMED])
def test_a_server_that_never_scores_is_an_error_and_not_a_zero(server, pictures, failure):
    last = {500: "500", "slow": "time"}.get(failure, "expected a success with a number")
    server.always = failure
    scorer = HttpScorer(server.url, tries=2, wait=0.01, timeout=0.1 if failure == "slow" else 60)
    with pytest.raises(RuntimeError, match=f"{server.url} gave no score for 'a dog' in 2 tries; .*{last}"):
        scorer.score(PROMPTS[:1], pictures[:1])
    assert len(server.asked) == 2


def test_a_server_that_is_not_there_is_an_error(server, pictures):
    with Server() as gone:
        url = gone.url
    with pytest.raises(RuntimeError, match="in 2 tries; the last time: .*(refused|connect)"):
        HttpScorer(url, tries=2, wait=0.01).score(PROMPTS, pictures)


def test_a_list_of_one_score_is_that_score(server, pictures):
    server.always = '{"success": true, "resultMap": {"scores": [0.25]}}'
    assert HttpScorer(server.url).score(PROMPTS, pictures) == [0.25] * 3


# One's own, and names


@pytest.fixture
def own(tmp_path, monkeypatch):
    text = "LIMIT = 3\n\ndef brightness(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "rewards_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_of_mine:brightness"


def test_a_function_of_ones_own_is_found_by_module_and_name(own, pictures):
    rewards = load_rewards(["shapes"], own=[own])
    assert list(rewards) == ["shapes", own]
    assert rewards[own](PROMPTS, pictures) == [1.0] * 3


def test_a_recipes_names_import_nothing(own, monkeypatch):
    monkeypatch.setattr("thinkclearly.training.rewards.import_module", lambda name: pytest.fail("imported"))
    with pytest.raises(ValueError, match="is none of shapes.*on the command line: --own_rewards module:function"):
        load_rewards([own])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:f", "cannot import not_there .*PYTHONPATH=."),
        ("rewards_of_mine:darkness", "rewards_of_mine has no function darkness"),
        ("rewards_of_mine:LIMIT", "rewards_of_mine has no function LIMIT"),
        ("rewards_of_mine", "expected module:function"),
        ("vqa:org/name", "expected module:function"),
    ],
)
def test_what_is_no_function_of_ones_own_is_refused(own, name, message):
    with pytest.raises(ValueError, match=f"--own_rewards {name}: {message}"):
        load_rewards([], own=[name])


@pytest.mark.parametrize("name", ["shape", "vqa", "vqa:", "clip:", "http:localhost", "http://localhost/score", ""])
def test_an_unknown_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(ValueError, match="is none of shapes, shape_edits, vqa:MODEL, clip:MODEL and http:URL"):
        load_rewards([name])


def test_a_reward_given_twice_is_refused():
    with pytest.raises(ValueError, match="shapes given twice"):
        load_rewards(["shapes", "shapes"])
