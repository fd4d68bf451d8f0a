"""The student as a citizen of transformers: a state that rewinds, drafting, streaming, pipelines, compilation.

    python -m pytest tests/test_citizen.py

Wherever a state was rewound, the oracle is the same student reading the kept tokens once, from the start.
"""

import copy

import pytest
import torch
from conftest import World
from test_student import TIGHT, V, make_student, random_ids
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from distill.student import LSTMCache, LSTMForCausalLM

# ---------------------------------------------------------------- rewinding


def read_in_calls(student: LSTMForCausalLM, ids_BT: torch.Tensor, calls: list[int]) -> LSTMCache:
    cache = LSTMCache()
    for ids_Bt in ids_BT.split(calls, dim=1):
        student(ids_Bt, past_key_values=cache)
    return cache


@pytest.mark.parametrize("calls", [[9], [1] * 9, [5, 1, 1, 2], [2, 4, 3]], ids=str)
@pytest.mark.parametrize("kept", range(9))
def test_a_cropped_state_is_the_state_of_the_kept_tokens(calls, kept):
    student = make_student()
    ids_BT, next_BT = random_ids(2, 9), random_ids(2, 3, seed=8)
    expected_BTV = student(torch.cat([ids_BT[:, :kept], next_BT], dim=1)).logits[:, kept:]
    for argument in {kept - 9, kept or -9}:  # negative: positions to remove; positive: positions to keep
        cache = read_in_calls(student, ids_BT, calls)
        before = copy.copy(cache)
        cache.crop(argument)
        assert cache.get_seq_length() == kept
        torch.testing.assert_close(student(next_BT, past_key_values=cache).logits, expected_BTV, **TIGHT)
        assert before.get_seq_length() == 9  # a copy does not follow
        before.crop(argument)
        torch.testing.assert_close(student(next_BT, past_key_values=before).logits, expected_BTV, **TIGHT)


def test_a_state_can_be_cropped_again_and_again():
    student = make_student()
    ids_1T = random_ids(1, 40)
    generator = torch.Generator().manual_seed(0)
    cache, kept_1T = LSTMCache(), ids_1T[:, :0]
    for _ in range(12):
        new_1T = random_ids(1, int(torch.randint(1, 6, (), generator=generator)), seed=int(kept_1T.shape[1]))
        student(new_1T, past_key_values=cache)
        kept_1T = torch.cat([kept_1T, new_1T], dim=1)
        removed = int(torch.randint(0, min(5, kept_1T.shape[1]), (), generator=generator))
        cache.crop(-removed)
        kept_1T = kept_1T[:, : kept_1T.shape[1] - removed]
        assert cache.get_seq_length() == kept_1T.shape[1]
    torch.testing.assert_close(cache.c_LBH, student(kept_1T).past_key_values.c_LBH, **TIGHT)


def test_padding_and_resets_are_read_again_as_they_were():
    student = make_student()
    ids_BT, next_BT = random_ids(2, 6), random_ids(2, 2, seed=8)
    mask_BT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = student(ids_BT, attention_mask=mask_BT).past_key_values
    cache.crop(-1)
    logits_BTV = student(next_BT, past_key_values=cache).logits
    for row, begin in enumerate([3, 0]):
        alone_1T = torch.cat([ids_BT[row : row + 1, begin:5], next_BT[row : row + 1]], dim=1)
        torch.testing.assert_close(logits_BTV[row], student(alone_1T).logits[0, -2:], **TIGHT)


def test_what_cannot_be_rewound_says_why_and_is_left_alone():
    student = make_student()
    cache = read_in_calls(student, random_ids(1, 300), [200, *[1] * 100])
    assert sum(call.begin < 300 for call in cache.calls) == LSTMCache.REWINDABLE  # memory stays constant
    cache.crop(-LSTMCache.REWINDABLE)
    for change in (lambda: None, lambda: cache.reorder_cache(torch.tensor([0]))):
        change()
        state_LBH, seen = cache.h_LBH, cache.get_seq_length()
        with pytest.raises(ValueError, match=f"{seen - 1} of {seen} positions .* back to {seen}"):
            cache.crop(-1)
        assert cache.get_seq_length() == seen and cache.h_LBH is state_LBH
        cache.crop(0)
        cache.crop(seen)
    student.train()
    with pytest.raises(ValueError, match="training"):
        student(random_ids(1, 4), use_cache=True).past_key_values.crop(-1)


# ---------------------------------------------------------------- drafting, and being drafted for


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(config).double().eval()


def noisy(student: LSTMForCausalLM, scale: float) -> LSTMForCausalLM:
    """A neighbour that agrees with the student now and then."""
    other = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def pairs(teacher: LlamaForCausalLM):
    student = make_student()
    yield "student drafts for its teacher", teacher, student
    yield "teacher drafts for the student", student, teacher
    yield "a neighbour drafts for the student", student, noisy(student, 0.1)
    yield "the student drafts for itself", student, copy.deepcopy(student)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("number", range(4))
def test_assisted_generation_writes_what_the_model_alone_writes(teacher, number, schedule):
    name, main, assistant = list(pairs(teacher))[number]
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = 0
    forward = type(main).forward

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(main, *args, **kwargs)

    for seed in range(3):
        prompt_1T = random_ids(1, 5, seed=seed)
        expected = main.generate(prompt_1T, max_new_tokens=30, do_sample=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "forward", counted)
            found = main.generate(prompt_1T, assistant_model=assistant, max_new_tokens=30, do_sample=False)
        assert torch.equal(found, expected)
    if "itself" in name:  # every draft is accepted, so each call of the main model yields one more than drafted
        assert calls <= 3 * 30 / 5
    if "neighbour" in name:  # some drafts were accepted and some were not
        assert 3 * 30 / 5 < calls < 3 * 30


@pytest.mark.parametrize("roles", ["student drafts", "teacher drafts"])
def test_assisted_sampling_keeps_the_distribution(teacher, roles):
    """Two tokens after a prompt, 400 times, against their exact probabilities (chi-square over pairs)."""
    main, assistant = (teacher, make_student()) if roles == "student drafts" else (make_student(), teacher)
    for model in (main, assistant):  # a vocabulary of 29 has 841 pairs: sharpen, so that few of them matter
        model.generation_config.temperature = 0.4
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    prompt_1T = random_ids(1, 4)
    with torch.no_grad():
        first_V = (main(prompt_1T).logits[0, -1] / 0.4).softmax(-1)
        nexts_VT = torch.cat([prompt_1T.expand(V, -1), torch.arange(V)[:, None]], dim=1)
        joint_VV = first_V[:, None] * (main(nexts_VT).logits[:, -1] / 0.4).softmax(-1)
    torch.manual_seed(0)
    draws = 400
    counts_VV = torch.zeros(V, V, dtype=torch.float64)
    for _ in range(draws):
        # one more than are looked at, so that the second is drafted too
        out = main.generate(prompt_1T, assistant_model=assistant, max_new_tokens=3, do_sample=True, top_k=0)
        counts_VV[out[0, 4], out[0, 5]] += 1
    frequent = joint_VV * draws >= 5
    expected = torch.cat([joint_VV[frequent], joint_VV[~frequent].sum()[None]]) * draws
    found = torch.cat([counts_VV[frequent], counts_VV[~frequent].sum()[None]])
    statistic = ((found - expected).square() / expected).sum()
    freedom = len(expected) - 1
    assert freedom >= 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)  # mean and four deviations


# ---------------------------------------------------------------- the library's ways to generate


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student of the tiny world, saved with its tokenizer."""
    path = tmp_path_factory.mktemp("student")
    student = make_student(dtype=torch.float32, vocab_size=64, pad_token_id=0, eos_token_id=0, bos_token_id=0)
    student.save_pretrained(path)
    AutoTokenizer.from_pretrained(world.teacher, padding_side="left").save_pretrained(path)
    return str(path)


def test_pipeline_and_streamers(folder, capsys):
    generator = pipeline("text-generation", model=folder, tokenizer=folder, dtype="auto")
    prompts = ["the river is", "a"]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [rows[0]["generated_text"] for rows in generator(prompts, batch_size=2, **options)]
    assert together == alone and all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))

    tokenizer, inputs = generator.tokenizer, generator.tokenizer(prompts[0], return_tensors="pt")
    generator.model.generate(**inputs, streamer=TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out.split() == tokenizer.decode(generator.model.generate(**inputs, **options)[0]).split()
    streamer = TextIteratorStreamer(tokenizer)
    stop = StoppingCriteriaList([MaxLengthCriteria(5)])
    stopped = generator.model.generate(**inputs, streamer=streamer, stopping_criteria=stop, **options)
    assert stopped.shape == (1, 5)
    assert "".join(streamer).split() == tokenizer.decode(stopped[0]).split()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_map(folder, device_map):
    plain = LSTMForCausalLM.from_pretrained(folder)
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    ids_BT = random_ids(2, 5)
    assert torch.equal(spread(ids_BT).logits, plain(ids_BT).logits)
    assert torch.equal(spread.generate(ids_BT, max_new_tokens=4), plain.generate(ids_BT, max_new_tokens=4))


def test_a_resized_vocabulary_generates(folder):
    student = LSTMForCausalLM.from_pretrained(folder)
    prompt_1T = torch.tensor([[3, 4]])
    before = student.generate(prompt_1T, max_new_tokens=5, do_sample=False)
    student.resize_token_embeddings(70)
    with torch.no_grad():
        student.lm_head.weight[64:] = 0
    assert torch.equal(student.generate(prompt_1T, max_new_tokens=5, do_sample=False), before)
    assert student(torch.tensor([[69]])).logits.shape == (1, 1, 70)


def test_compiled_it_reads_and_generates_the_same():
    student = make_student(dtype=torch.float32, pad_token_id=0)
    ids_BT = random_ids(2, 5)
    expected_BTV = student(ids_BT).logits
    generated = student.generate(ids_BT, max_new_tokens=6, do_sample=False)
    compiled = torch.compile(student, backend="aot_eager")
    torch.testing.assert_close(compiled(ids_BT).logits, expected_BTV)
    student.forward = torch.compile(student.forward, backend="aot_eager")
    assert torch.equal(student.generate(ids_BT, max_new_tokens=6, do_sample=False), generated)
