"""What training drops is what the sampler's unconditional branch leaves out: the same tokens, at the same places."""

import numpy as np
import pytest

from mmgen.data.loader import Rows
from mmgen.data.packing import DROP_IMAGES, DROP_TEXT
from mmgen.data.shards import Shards, write
from mmgen.document import Document, Image, Text, Turn
from mmgen.sampling.sampler import Request
from tests.conftest import whole_model


def documents(grammar, rng):
    """Prompts, edits and dialogues, all with codes."""
    codes = lambda: Image(codes=rng.integers(0, grammar.codes, rng.integers(1, 5, 2)))
    for k in range(40):
        turns = [Turn("system", [Text("be brief")])] if k % 3 == 0 else []
        for turn in range(1 + k % 3):
            asks = [codes(), Text(f"make it {turn}")] if k % 2 or turn else [Text(f"a red circle {k}")]
            turns += [
                Turn("user", asks),
                Turn("assistant", [Text("here"), codes()] if k % 4 == 1 else [codes()]),
            ]
        yield Document(turns)


def test_a_training_row_without_text_is_what_the_sampler_asks_without_text(sampler, tmp_path):
    grammar, text = sampler.grammar, sampler.text
    found = list(documents(grammar, np.random.default_rng(0)))
    write(tmp_path, [grammar.encode(document, text) for document in found], grammar)
    shards = Shards(tmp_path)
    longest = int(shards.lengths[:][:, 0, 0].max())
    loader = Rows(shards, grammar, batch_size=1, row_length=longest, text_drop=0.5, image_drop=0.3)
    seen = set()
    for step in range(3 * len(found)):
        batch = loader.batch(step)
        for segment, (i, variant) in enumerate(zip(*loader.plan.row(step)), 1):
            here = batch["segments"][0] == segment
            tokens, positions = batch["tokens"][0][here], batch["positions"][0][here]
            # The prompt of this document's last answer, with text and without, as the sampler writes it.
            request = Request(Document(found[i].turns[:-1]), guidance=2.0, image_guidance=2.0)
            full, *dropped = sampler.prompts(request)
            if variant & DROP_IMAGES and not variant & DROP_TEXT:
                continue  # training has text without images too; no branch asks so
            prompt = dropped[-1] if variant & DROP_IMAGES else dropped[0] if variant & DROP_TEXT else full
            np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
            np.testing.assert_array_equal(positions[: len(prompt)], grammar.positions(prompt))
            seen.add((int(i), int(variant)))
            # What follows is the answer, right behind the prompt.
            rest = grammar.encode(Document(found[i].turns), text)[len(full) :]
            np.testing.assert_array_equal(tokens[len(prompt) :], rest)
    assert len(seen) > 1.5 * len(found)


@pytest.mark.parametrize("text_drop", [0.0, 1.0])
def test_logits_of_both_agree(space, sampler, tmp_path, text_drop):
    """A row of several documents through the training model, and each prompt alone through the sampler's prefill."""
    import jax.numpy as jnp
    from flax import nnx

    from mmgen.sampling import cache as caches

    grammar, text = sampler.grammar, sampler.text
    found = list(documents(grammar, np.random.default_rng(1)))[:12]
    write(tmp_path, [grammar.encode(document, text) for document in found], grammar)
    loader = Rows(Shards(tmp_path), grammar, batch_size=1, row_length=600, text_drop=text_drop)
    batch = loader.batch(0)
    model = nnx.merge(*whole_model(space.transformer))
    # Every prompt is padded to one length, and all is jitted: two programs, not one for each operation and length.
    row = (batch[name] for name in ("tokens", "segments", "positions"))
    hidden = np.asarray(nnx.jit(lambda model, *row: model(*row))(model, *row))[0]
    prompts = [
        sampler.prompts(Request(Document(found[i].turns[:-1]), guidance=2.0))[int(text_drop)]
        for i in loader.plan.row(0)[0][:4]
    ]
    longest = max(map(len, prompts))

    @nnx.jit
    def prefill(model, tokens, positions):
        weights, cache = caches.prepare(model, jnp.float32), caches.empty(model.config, 1, longest, jnp.float32)
        return caches.step(model, weights, cache, tokens, positions, jnp.zeros(1, jnp.int32))[0]

    for segment, prompt in enumerate(prompts, 1):
        padded = np.pad(prompt, (0, longest - len(prompt)))
        positions = np.pad(grammar.positions(prompt), ((0, longest - len(prompt)), (0, 0)))
        alone = np.asarray(prefill(model, padded[None], positions[None]))[0, : len(prompt)]
        here = np.flatnonzero(batch["segments"][0] == segment)[: len(prompt)]
        np.testing.assert_allclose(hidden[here], alone, atol=2e-4)
