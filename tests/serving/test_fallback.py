"""A served student with its teacher behind it: who answers, what is paid, audits and breaches."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import good_answer, run_dsbs, toy_rows
from encoder_models import label_head_student
from loopback import LoopbackServer, question
from served import here, in_process
from serving.test_serve_predict import post

from dsbs import UserError, annotate, load_recipe
from dsbs.annotation.backends.openai import OpenAITeacher
from dsbs.cli.annotate import _with_served_rows
from dsbs.config import Recipe
from dsbs.progress import NoProgress
from dsbs.project import live_teacher
from dsbs.project.live_teacher import open_cascade
from dsbs.project.runs import resolve_recipe
from dsbs.records.measures import exact_rate
from dsbs.serving.cascade import FALSE_ALARMS, Cascade, CascadeSettings, log_evidence
from dsbs.serving.ledger import Ledger, read_states
from dsbs.students.calibration import Threshold, write_record
from dsbs.students.novelty import fit_novelty, read_novelty

STUDENT = label_head_student()
TEXTS = [row["text"] for row in toy_rows(40)]
OWN = dict(zip(TEXTS, STUDENT.predict(TEXTS), strict=True))
KEY = "sk-very-secret"


def confidence(text: str) -> float:
    return OWN[text].probability or 0.0


THRESHOLD = sorted(map(confidence, TEXTS))[20]
SURE = [text for text in TEXTS if confidence(text) >= THRESHOLD]
UNSURE = [text for text in TEXTS if confidence(text) < THRESHOLD]


def threshold(value: float | None = THRESHOLD, **changes: Any) -> Threshold:
    fields: dict[str, Any] = {
        "student": "f",
        "confidence": "probability",
        "temperature": 1.0,
        "threshold": value,
        "of": "agreement",
        "target": 0.9,
        "level": 0.95,
        "bound": 0.92,
        "rows": 200,
        "coverage": 0.5,
    }
    return Threshold(**fields | changes)


def as_student(body: dict[str, Any], number: int) -> str:
    """A teacher that always agrees with the student."""
    text = next(text for text in TEXTS if text in question(body))
    return f"For this reason.\nAnswer: {OWN[text].label}"


def otherwise(body: dict[str, Any], number: int) -> str:
    """A teacher that never does."""
    text = next(text for text in TEXTS if text in question(body))
    return f"For that reason.\nAnswer: {'shipping' if OWN[text].label == 'billing' else 'billing'}"


class Setup:
    """A student's folder, and recipes with a teacher at a server."""

    def __init__(self, folder: Path, toy: Callable[..., Path]) -> None:
        self.student = folder / "student"
        self.run = folder / "run"
        self.path = toy(teacher={"api_key_env": "LOOPBACK_KEY", "max_attempts": 1})
        STUDENT.save(self.student)
        write_record(self.student, threshold())

    def recipe(self, server: LoopbackServer | None, *changes: str) -> Recipe:
        url = "http://127.0.0.1:9/v1" if server is None else server.url
        price = "teacher.price={input: 100, output: 100}"
        return load_recipe(self.path, [f"teacher.base_url={url}", price, *changes])

    @contextmanager
    def cascade(
        self, server: LoopbackServer | None, *changes: str, **options: Any
    ) -> Iterator[Cascade]:
        settings = CascadeSettings(**{"audit": 0.0} | options)
        recipe = self.recipe(server, *changes)
        with open_cascade(
            str(self.student), recipe, settings, NoProgress(), out=str(self.run)
        ) as cascade:
            yield cascade


@pytest.fixture
def setup(tmp_path: Path, toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    return Setup(tmp_path, toy)


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def audited(cascade: Cascade, number: int) -> None:
    while cascade.ledger.state.counts.get("audited", 0) < number:
        await asyncio.sleep(0.005)


def test_sure_rows_are_the_students_and_the_others_the_teachers(setup: Setup) -> None:
    async def main(server: LoopbackServer) -> tuple[list[Any], str]:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                url = f"{running.url}/predict"
                posts = [post(url, {"inputs": [{"text": text}]}) for text in TEXTS]
                answers = await asyncio.gather(*posts, post(url, {"inputs": TEXTS}))
                return answers, (await get(f"{running.url}/metrics"))[1]

    with LoopbackServer(good_answer) as server:
        answers, metrics = asyncio.run(main(server))
    predictions = [body["predictions"][0] for _, body in answers[:-1]]
    assert predictions == answers[-1][1]["predictions"]
    for text, prediction in zip(TEXTS, predictions, strict=True):
        assert prediction["confidence"] == pytest.approx(confidence(text), abs=1e-5)
        assert prediction["threshold"] == THRESHOLD
        source = "student" if text in SURE else "teacher"
        assert prediction["source"] == source
        label = OWN[text].label
        if source == "teacher":
            label = "billing" if "invoice" in text else "shipping"
        assert prediction["label"] == label
    # Each row came twice, at the same time; each request was paid for once.
    assert server.requests == len(UNSURE) and set(server.received.values()) == {1}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in metrics and KEY not in json.dumps(answers)
    assert f"dsbs_cascade_deferred_total {2 * len(UNSURE)}\n" in metrics
    assert f"dsbs_cascade_sure_total {2 * len(SURE)}\n" in metrics
    assert 'dsbs_cascade_rows_total{source="teacher"} 40\n' in metrics
    usd = len(UNSURE) * (11 + 7) * 100 / 1e6
    assert f"dsbs_cascade_usd_total {usd:g}\n" in metrics
    assert f"dsbs_cascade_usd_today {usd:g}\n" in metrics


def test_the_openai_routes_say_who_answered(setup: Setup) -> None:
    async def main(server: LoopbackServer) -> list[Any]:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                v1 = f"{running.url}/v1"
                message = [{"role": "user", "content": UNSURE[0]}]
                texts = [SURE[0], UNSURE[0]]
                return [
                    await post(f"{v1}/completions", {"prompt": texts, "logprobs": 1}),
                    await post(f"{v1}/chat/completions", {"messages": message, "max_tokens": 50}),
                ]

    with LoopbackServer(as_student) as server:
        (_, completed), (_, chatted) = asyncio.run(main(server))
    assert [choice["source"] for choice in completed["choices"]] == ["student", "teacher"]
    assert [choice["text"] for choice in completed["choices"]] == [
        OWN[SURE[0]].label,
        OWN[UNSURE[0]].label,
    ]
    assert completed["choices"][1]["logprobs"] is None
    choice = chatted["choices"][0]
    assert choice["message"]["content"] == OWN[UNSURE[0]].label
    assert (choice["source"], choice["threshold"]) == ("teacher", THRESHOLD)
    assert server.requests == 1


Teacher = Callable[[dict[str, Any], int], Any]
THROTTLES: Teacher = lambda body, number: (429, {"Retry-After": "30"}, b"{}")  # noqa: E731
FAILURES: dict[str, tuple[Teacher | None, str]] = {
    "dead": (None, "it does not answer"),
    "throttles": (THROTTLES, "no answer within 0.3 s"),
    "fails": (lambda body, number: (500, {}, KEY.encode()), "it does not answer"),
    "refuses the key": (lambda body, number: (401, {}, KEY.encode()), "it does not answer"),
    "rambles": (lambda body, number: "I would rather not say.", "its reply has no label"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("policy", ["student", "error"])
def test_without_an_answer_of_the_teacher_the_policy_decides(
    setup: Setup, name: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, reason = FAILURES[name]

    async def main(server: LoopbackServer | None) -> tuple[list[Any], str]:
        # Only a throttled reply never comes: a busy machine must not cut the others short.
        timeout_s = 0.3 if name == "throttles" else 30
        with setup.cascade(
            server, on_teacher_failure=policy, teacher_timeout_s=timeout_s
        ) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                posts = [post(f"{running.url}/predict", {"inputs": [t]}) for t in TEXTS]
                answers = await asyncio.gather(*posts)
                return answers, (await get(f"{running.url}/metrics"))[1]

    if teacher is None:
        answers, metrics = asyncio.run(main(None))
    else:
        with LoopbackServer(teacher) as server:
            answers, metrics = asyncio.run(main(server))
    for text, (status, body) in zip(TEXTS, answers, strict=True):
        if text in UNSURE and policy == "error":
            assert status == 502 and body["error"]["code"] == "teacher_failed"
            continue
        prediction = body["predictions"][0]
        assert prediction["label"] == OWN[text].label and prediction["source"] == "student"
        assert ("teacher_failure" in prediction) == (text in UNSURE)
    assert reason in json.dumps(answers)
    assert f'dsbs_cascade_rows_total{{source="failed"}} {len(UNSURE)}\n' in metrics
    assert KEY not in json.dumps(answers) + metrics + caplog.text


def test_sure_rows_never_wait_and_a_late_reply_is_kept(setup: Setup) -> None:
    release = threading.Event()

    def slow(body: dict[str, Any], number: int) -> str:
        release.wait(20)
        return good_answer(body, number)

    async def main(server: LoopbackServer) -> list[Any]:
        with setup.cascade(server, teacher_timeout_s=0.05) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                url = f"{running.url}/predict"
                late = await post(url, {"inputs": [UNSURE[0]]})
                sure = await post(url, {"inputs": [SURE[0]]})
                release.set()
                while not cascade.ledger.state.counts.get("deferred"):
                    await asyncio.sleep(0.005)
                return [late, sure, await post(url, {"inputs": [UNSURE[0]]})]

    with LoopbackServer(slow) as server:
        answers = asyncio.run(main(server))
    late, sure, again = (body["predictions"][0] for _, body in answers)
    assert late["teacher_failure"].startswith("no answer") and "teacher_failure" not in sure
    assert again["source"] == "teacher" and server.requests == 1


def test_rows_that_nobody_waits_for_are_not_sent_once_the_teacher_is_back(setup: Setup) -> None:
    back = threading.Event()

    def dead(body: dict[str, Any], number: int) -> str:
        back.wait(20)
        return good_answer(body, number)

    async def main(server: LoopbackServer) -> list[Any]:
        with setup.cascade(server, "annotate.concurrency=1", teacher_timeout_s=2.0) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                url = f"{running.url}/predict"
                first = asyncio.create_task(post(url, {"inputs": [UNSURE[0]]}))
                while not server.received:
                    await asyncio.sleep(0.005)
                waited = [await post(url, {"inputs": [UNSURE[1]]}), await first]
                back.set()
                while not cascade.ledger.state.counts.get("deferred"):
                    await asyncio.sleep(0.005)
                return [*waited, await post(url, {"inputs": [UNSURE[2]]})]

    with LoopbackServer(dead) as server:
        answers = asyncio.run(main(server))
    *waited, new = (body["predictions"][0] for _, body in answers)
    assert all("no answer" in prediction["teacher_failure"] for prediction in waited)
    assert new["source"] == "teacher"
    assert not any(UNSURE[1] in prompt for prompt in server.received), "it was never sent"


def test_a_day_has_a_limit_of_dollars_that_a_restart_keeps(setup: Setup) -> None:
    async def main(server: LoopbackServer) -> list[str]:
        cap = ("annotate.max_tokens=7", "annotate.concurrency=1")
        with setup.cascade(server, *cap, max_usd=0.02) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                answers = [
                    await post(f"{running.url}/predict", {"inputs": [text]}) for text in UNSURE
                ]
        return [body["predictions"][0].get("teacher_failure", "") for _, body in answers]

    with LoopbackServer(good_answer) as server:
        first = asyncio.run(main(server))
        asked = server.requests
        second = asyncio.run(main(server))
        assert server.requests == asked
    bought = [failure for failure in first if not failure]
    assert 0 < len(bought) == asked < len(UNSURE)
    assert first == second and "limit of dollars" in first[-1]
    (state,) = read_states(setup.run / "serve" / "ledger.sqlite")
    assert state.usd_today == pytest.approx(asked * 0.0018) and state.usd <= 0.02


def test_without_a_threshold_of_its_own_a_student_is_refused(setup: Setup) -> None:
    (setup.student / "threshold.json").unlink()
    with pytest.raises(UserError, match="has no threshold") as refused, setup.cascade(None):
        pass
    assert "dsbs eval RECIPE eval.cascade.target=0.98" in refused.value.hint
    write_record(setup.student, threshold(temperature=2.0))
    with pytest.raises(UserError, match="another training"), setup.cascade(None):
        pass
    write_record(setup.student, threshold())
    with pytest.raises(UserError, match="task"), setup.cascade(None, "task.labels=[a, b]"):
        pass
    assert not setup.run.exists()


def test_all_goes_to_the_teacher_where_no_threshold_holds(setup: Setup) -> None:
    write_record(setup.student, threshold(None))

    async def main(server: LoopbackServer) -> Any:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                return await post(f"{running.url}/predict", {"inputs": SURE})

    with LoopbackServer(good_answer) as server:
        _, body = asyncio.run(main(server))
    assert {row["source"] for row in body["predictions"]} == {"teacher"}
    assert {row["threshold"] for row in body["predictions"]} == {None}


def test_an_input_unlike_the_validation_rows_is_the_teachers_however_sure(setup: Setup) -> None:
    student = label_head_student()
    states = student.backend.pooled_states(TEXTS).double().numpy()  # type: ignore[attr-defined]
    assert fit_novelty(states[:5]) is None
    student.novelty = fit_novelty(states)
    assert student.novelty is not None
    student.save(setup.student)
    read = read_novelty(setup.student)
    assert read is not None and read.limit == student.novelty.limit
    assert max(read.distances(states)) <= read.limit
    write_record(setup.student, threshold(0.0))
    strange = "parcel invoice " * 8

    async def main(server: LoopbackServer) -> tuple[Any, str]:
        with setup.cascade(server) as cascade:
            async with here(student, cascade=cascade) as running:
                asked = await post(f"{running.url}/predict", {"inputs": [*TEXTS, strange]})
                return asked, (await get(f"{running.url}/metrics"))[1]

    with LoopbackServer(good_answer) as server:
        (_, body), metrics = asyncio.run(main(server))
    sources = [prediction["source"] for prediction in body["predictions"]]
    assert sources == ["student"] * len(TEXTS) + ["teacher"]
    assert "dsbs_cascade_novel_total 1\n" in metrics
    assert server.requests == 1
    own = [prediction["distribution"] for prediction in body["predictions"][:-1]]
    for distribution, answer in zip(own, OWN.values(), strict=True):
        assert distribution == pytest.approx(answer.distribution, abs=1e-5)


def test_an_endpoints_error_text_reaches_no_log(
    setup: Setup, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def echoes(body: dict[str, Any], number: int) -> Any:
        error = {"error": {"message": f"no model for {UNSURE[0]!r}", "type": "model_not_found"}}
        return 404, {}, json.dumps(error).encode()

    async def main(server: LoopbackServer) -> Any:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                return await post(f"{running.url}/predict", {"inputs": [UNSURE[0]]})

    with LoopbackServer(echoes) as server:
        _, body = asyncio.run(main(server))
    assert body["predictions"][0]["teacher_failure"] == "it does not answer"
    assert "dsbs doctor" in caplog.text
    assert UNSURE[0] not in caplog.text + capsys.readouterr().err


def test_a_teacher_that_was_never_asked_is_closed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[OpenAITeacher] = []
    closed: list[OpenAITeacher] = []

    def make(recipe: Recipe) -> OpenAITeacher:
        made.append(OpenAITeacher(recipe))
        return made[-1]

    async def close(teacher: OpenAITeacher) -> None:
        closed.append(teacher)

    monkeypatch.setattr(live_teacher, "make_teacher", make)
    monkeypatch.setattr(OpenAITeacher, "close", close)
    with setup.cascade(None):
        pass
    assert len(made) == 1 and closed == made


# --- ledger


def fail(ledger: Ledger) -> None:
    """Let every write to the ledger fail, as on a full disk, after the transaction began."""
    for table in ("counts", "audits", "rows", "spending"):
        ledger._db.execute(
            f"CREATE TEMP TRIGGER full_{table} BEFORE INSERT ON main.{table}"
            " BEGIN SELECT RAISE(FAIL, 'full'); END"
        )


def mend(ledger: Ledger) -> None:
    for table in ("counts", "audits", "rows", "spending"):
        ledger._db.execute(f"DROP TRIGGER full_{table}")


def test_a_ledger_that_cannot_be_written_costs_no_answer(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsbs.serving.cascade._FLUSH_S", 0.01)

    async def main(server: LoopbackServer) -> list[Any]:
        with setup.cascade(server, audit=1.0) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                fail(cascade.ledger)
                broken = await post(f"{running.url}/predict", {"inputs": TEXTS})
                while "the ledger" not in caplog.text or server.requests < len(TEXTS):
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)  # some flushes that fail
                mend(cascade.ledger)
                again = await post(f"{running.url}/predict", {"inputs": TEXTS})
                await audited(cascade, 1)
                return [broken, again]

    with LoopbackServer(as_student) as server:
        answers = asyncio.run(main(server))
    for status, body in answers:
        assert status == 200
        sources = [prediction["source"] for prediction in body["predictions"]]
        assert sources == ["student" if text in SURE else "teacher" for text in TEXTS]
    assert caplog.text.count("the ledger cannot be written") == 1
    assert not any(text in caplog.text for text in TEXTS)
    (state,) = read_states(setup.run / "serve" / "ledger.sqlite")
    assert state.counts["sure"] == 2 * len(SURE), "counts wait until they can be written"
    assert state.counts["teacher"] == 2 * len(UNSURE)
    assert state.audited == state.counts["audited"] > 0


def test_a_breach_that_cannot_be_written_closes_the_student(setup: Setup) -> None:
    with setup.cascade(None) as cascade:
        ledger = cascade.ledger
        ledger._db.execute("PRAGMA query_only = ON")
        with ledger.survive_errors():
            ledger.set_breach("misses the target")
        ledger._db.execute("PRAGMA query_only = OFF")
        ledger.add_usd(0.01)
        assert ledger.breach == "misses the target"
        ledger.reset_audit()
        assert ledger.breach is None


# --- audit


def test_the_teacher_is_asked_for_deferred_and_audited_rows_and_nothing_else(setup: Setup) -> None:
    async def main(server: LoopbackServer) -> str:
        with setup.cascade(server, audit=1.0) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                await post(f"{running.url}/predict", {"inputs": TEXTS})
                await audited(cascade, len(SURE))
                return (await get(f"{running.url}/metrics"))[1]

    with LoopbackServer(as_student) as server:
        metrics = asyncio.run(main(server))
    assert server.requests == len(TEXTS)
    assert f"dsbs_cascade_deferred_total {len(UNSURE)}\n" in metrics
    assert f"dsbs_cascade_audited_total {len(SURE)}\n" in metrics
    rate = exact_rate(len(SURE), len(SURE))
    assert rate is not None
    assert f"dsbs_cascade_audit_agreement_low {rate.ci95[0]}\n" in metrics
    remark = next(line for line in resolve_text(setup) if "served" in line)
    assert "agrees with 100" in remark and f"{len(SURE)} audited answers" in remark


def resolve_text(setup: Setup) -> list[str]:
    with LoopbackServer(good_answer) as server:
        annotate(setup.recipe(server), out=setup.run)
    resolved = resolve_recipe(str(setup.run))
    assert resolved.as_json()["served"][0]["audited"] == len(SURE)
    return resolved.as_yaml().splitlines()


def test_a_breach_closes_the_student_until_a_person_resets_it(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(server: LoopbackServer, **options: Any) -> tuple[Any, Any, int]:
        with setup.cascade(server, audit=1.0, **options) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                before = cascade.ledger.state.counts.get("audited", 0)
                _, body = await post(f"{running.url}/predict", {"inputs": SURE})
                if body["predictions"][0]["source"] == "student":
                    await audited(cascade, before + len(SURE))
                health = json.loads((await get(f"{running.url}/health"))[1])
                return body["predictions"][0]["source"], health, cascade.ledger.state.audited

    with LoopbackServer(otherwise) as server:
        source, health, rows = asyncio.run(ask(server, on_breach="warn"))
        assert source == "student" and health["mode"] == "cascade"
        assert "agrees with 0" in health["breach"] and rows == len(SURE)
        assert "the student goes on" in caplog.text
        source, health, rows = asyncio.run(ask(server))
        assert source == "student" and health["mode"] == "teacher only"
        assert "the teacher answers everything" in caplog.text
        source, health, _ = asyncio.run(ask(server))
        assert source == "teacher" and health["mode"] == "teacher only"
        source, _, rows = asyncio.run(ask(server, reset_audit=True, on_breach="warn"))
        assert source == "student" and rows == len(SURE)
    assert not any(text in caplog.text for text in TEXTS)


def test_looking_after_every_row_seldom_raises_a_false_alarm() -> None:
    random.seed(5)
    limit = math.log(1 / FALSE_ALARMS)

    def rows_until_alarm(rate: float, risk: float, most: int) -> int | None:
        events = 0
        for n in range(1, most + 1):
            is_event = random.random() < rate
            events += is_event
            if is_event and log_evidence(events, n, risk) >= limit:
                return n
        return None

    alarms = [rows_until_alarm(0.05, 0.05, 400) for _ in range(60)]
    assert sum(alarm is not None for alarm in alarms) <= 7  # binomial, 99% of 60 at 5%
    found = [rows_until_alarm(0.5, 0.025, 60) for _ in range(40)]
    assert None not in found and sum(filter(None, found)) / 40 < 10


def test_counts_survive_a_killed_server(setup: Setup) -> None:
    with LoopbackServer(as_student) as server:
        recipe = setup.path.with_name("served.yaml")
        settings = json.loads(setup.path.read_text(encoding="utf-8"))
        settings["teacher"]["base_url"] = server.url
        recipe.write_text(json.dumps(settings), encoding="utf-8")
        options = ("--fallback", str(recipe), "--out", str(setup.run), "--audit", "1")
        env = {"LOOPBACK_KEY": KEY}

        async def main(url: str) -> None:
            await post(f"{url}/predict", {"inputs": TEXTS})
            while f"audited_total {len(SURE)}\n" not in (await get(f"{url}/metrics"))[1]:
                await asyncio.sleep(0.02)

        with in_process(setup.student, *options, env=env) as (url, process):
            asyncio.run(main(url))
            process.kill()
            process.wait()
            assert KEY not in process.stdout + process.stderr
        sent = server.requests
        assert sent == len(TEXTS)

        async def again() -> str:
            with setup.cascade(server) as cascade:
                async with here(STUDENT, cascade=cascade) as running:
                    _, page = await get(f"{running.url}/metrics")
                    await post(f"{running.url}/predict", {"inputs": UNSURE})
                    return page

        metrics = asyncio.run(again())
        assert server.requests == sent, "the store was consistent, and nothing was paid twice"
    assert f"dsbs_cascade_audited_total {len(SURE)}\n" in metrics
    assert f"dsbs_cascade_deferred_total {len(UNSURE)}\n" in metrics


def test_rows_that_were_asked_become_training_rows_for_nothing(setup: Setup) -> None:
    texts = UNSURE[:5]

    async def main(server: LoopbackServer) -> None:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                await post(f"{running.url}/predict", {"inputs": [*texts, *texts]})

    with LoopbackServer(good_answer) as server:
        asyncio.run(main(server))
        recipe = setup.recipe(server, "annotate.splits=[train]", "annotate.max_requests=0")
        first = annotate(setup.recipe(server, "annotate.splits=[train]"), out=setup.run)
        sent = server.requests
        second = annotate(_with_served_rows(recipe, str(setup.run)), out=setup.run)
        assert server.requests == sent
    assert second.splits["train"].accepted == first.splits["train"].accepted + len(texts)
    same = setup.recipe(server, f"task.data.served={setup.run / 'serve' / 'rows.jsonl'}")
    assert _with_served_rows(same, str(setup.run)).task.data.served is not None
    with pytest.raises(UserError, match=r"task\.data\.served names others\.jsonl"):
        _with_served_rows(setup.recipe(server, "task.data.served=others.jsonl"), str(setup.run))


# --- bodies, documentation


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/predict", {"inputs": [{"subject": 1, "body": 2}]}, "no column 'text'"),
        ("/predict", {"inputs": [[]]}, "neither a text nor a row"),
        ("/predict", {"inputs": ["  "]}, "is empty"),
        ("/v1/completions", {"prompt": [""]}, "is empty"),
        ("/v1/chat/completions", {"messages": []}, "one user message"),
    ],
)
def test_a_bad_body_never_reaches_the_teacher(
    setup: Setup, path: str, body: Any, says: str
) -> None:
    async def main(server: LoopbackServer) -> Any:
        with setup.cascade(server) as cascade:
            async with here(STUDENT, cascade=cascade) as running:
                return await post(f"{running.url}{path}", body)

    with LoopbackServer(good_answer) as server:
        status, answer = asyncio.run(main(server))
        assert server.requests == 0
    assert status == 400 and says in answer["error"]["message"]


def test_the_documentation_is_served_with_examples_that_work() -> None:
    async def main() -> tuple[tuple[int, str], Any, list[Any]]:
        async with here(STUDENT, "token") as running:
            page = await get(f"{running.url}/docs")
            description = json.loads((await get(f"{running.url}/openapi.json"))[1])
            answers = []
            for path, methods in description["paths"].items():
                if "post" in methods:
                    content = methods["post"]["requestBody"]["content"]["application/json"]
                    headers = {"Authorization": "Bearer token"}
                    answers.append(
                        await post(f"{running.url}{path}", content["example"], headers=headers)
                    )
            return page, description, answers

    (status, page), description, answers = asyncio.run(main())
    assert status == 200 and "/openapi.json" in page
    assert len(answers) == 3 and {status for status, _ in answers} == {200}
    references = set(json.dumps(description).split('"#/components/schemas/')[1:])
    names = {reference.partition('"')[0] for reference in references}
    assert names <= set(description["components"]["schemas"])


@pytest.mark.parametrize(
    "option", [("--max-usd", "1"), ("--audit", "0.1"), ("--on-breach", "warn")]
)
def test_options_about_the_teacher_need_one(tmp_path: Path, option: tuple[str, str]) -> None:
    done = run_dsbs("serve", str(tmp_path), *option, cwd=tmp_path)
    assert done.returncode == 2 and "--fallback RECIPE" in done.stderr
