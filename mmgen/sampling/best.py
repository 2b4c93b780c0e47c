"""The best of several answers to a request: the likeliest, the favourite of a score, or the words from which the model itself would draw the picture."""

import dataclasses

import numpy as np

from mmgen.document import Document, Image, caption_to_image
from mmgen.sampling.sampler import draw_seed

_WORDS = 0.3  # what the likelihood of words counts beside that of the picture which they describe; chosen on the world's valid split


def best_of(sampler, requests, n, score=None, batch_size=16):
    """Answers each request n times and keeps the answer that `score` likes best -> (turns, scores float [B, n]).

    score(images uint8 [H, W, 3] each, texts) -> [N] numbers, such as `contrastive.Towers.score`; a request's text
    is that of its document, and only pictures are scored so. "drawing", of words that describe a picture: see `_as_drawn`. Without a
    score it is the mean log-likelihood of the answer's tokens, guidance aside. Draw 0 is the request's own, so more draws only add to
    choose from; the others of a greedy one are at temperature 1, as they would be the same.
    """
    if n < 1:
        raise ValueError(f"expected at least one draw of a request, found {n}")
    by_drawing = score == "drawing"
    if score and not by_drawing and any(request.output != "image" for request in requests):
        raise ValueError("only pictures are scored: expected output='image' of every request")
    requests = [
        dataclasses.replace(request, document=sampler.encoded(request.document)) for request in requests
    ]
    if by_drawing and any(request.output != "text" or not request.document.images() for request in requests):
        raise ValueError(
            "what is scored by drawing are words about a picture: expected output='text' and an image in every request"
        )
    unlike = lambda strategy: (
        strategy if strategy.temperature else dataclasses.replace(strategy, temperature=1.0)
    )
    draws = [
        dataclasses.replace(
            request, seed=draw_seed(request.seed, k), text=unlike(request.text), image=unlike(request.image)
        )
        if k
        else request
        for request in requests
        for k in range(n)
    ]
    turns, tokens = [None] * len(draws), [None] * len(draws)
    for i, turn, _, written in sampler.stream_tokens(draws, batch_size):
        turns[i], tokens[i] = turn, written
    if score and not by_drawing:
        drawn = [
            i for i, turn in enumerate(turns) if isinstance(turn.parts[0], Image)
        ]  # the others are refusals
        scores = np.zeros(len(turns))
        if drawn:
            texts = [draws[i].document.text() for i in drawn]
            scores[drawn] = score([turns[i].parts[0].pixels for i in drawn], texts)
    else:
        # Of the tokens that were drawn: a text may be written in other pieces than it is encoded in.
        prompts = [sampler.prompts(request)[0] for request in draws]
        rows = [np.concatenate(each) for each in zip(prompts, tokens)]
        once = {row.tobytes(): row for row in rows}  # texts are often the same
        nats = dict(zip(once, sampler.nats(list(once.values()), batch_size)))
        answers = [-nats[row.tobytes()][len(prompt) :] for row, prompt in zip(rows, prompts)]
        if by_drawing:
            scores = _as_drawn(sampler, draws, turns, batch_size)
            scores += _WORDS * np.array([each.sum() for each in answers])
        else:
            scores = [each.mean() for each in answers]
    scores = np.reshape(scores, (-1, n))
    return [turns[i * n + k] for i, k in enumerate(scores.argmax(1))], scores


def _as_drawn(sampler, requests, turns, batch_size):
    """How likely the last picture of each request's document is what the model draws where it is asked for with the answer's words ->
    log p(codes | words), float64 [N]; -inf where there are none, or more than the model's rows hold.

    A model that draws better than it reads so judges what it reads, as a noisy channel does (arXiv:1611.02554)."""
    rows, keys = {}, []
    for request, turn in zip(requests, turns):
        image, words = request.document.images()[-1], Document((turn,)).text().strip()
        keys.append((image.codes.tobytes(), image.codes.shape, words))
        if words and keys[-1] not in rows:
            document = caption_to_image(words, Image(codes=image.codes))
            rows[keys[-1]] = sampler.grammar.encode(document, sampler.text)
    rows = {key: row for key, row in rows.items() if len(row) <= sampler.longest}
    # The codes, and what leads out of the picture and the document after them.
    last = {key: int(np.prod(key[1])) + 3 for key in rows}
    nats = sampler.nats(list(rows.values()), batch_size)
    found = {key: -float(each[-last[key] :].sum()) for key, each in zip(rows, nats)}
    return np.array([found.get(key, -np.inf) for key in keys])
