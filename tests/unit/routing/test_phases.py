"""Prompts ranked by top-k and answers let in one by one: a cached step computes what that rule means."""

from dataclasses import dataclass

import torch

from plugins.mixture_of_depths import MixtureOfDepths
from routing import DepthSelector, ExpertChoice, LinearRouter, SelectBy, Threshold, TokenKind, attach
from tests.tiny import facts, padded, row, tiny_llava

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2)]
ANSWER, PROMPT = (TokenKind.ANSWER,), (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.VISION)
RANKED = ExpertChoice((*PROMPT, *ANSWER))


@dataclass(frozen=True)
class ByKind(DepthSelector):
    """The same rule for one forward over prompt and answer."""

    routes: tuple[TokenKind, ...] = (*PROMPT, *ANSWER)

    def chosen_BT(self, scores_BT, weights_BT, candidate_BT, tokens, capacity):
        ranked, alone = ExpertChoice(PROMPT), Threshold(ANSWER)
        best_BT = ranked.chosen_BT(scores_BT, weights_BT, tokens.mask(PROMPT), tokens, capacity)
        return best_BT | alone.chosen_BT(scores_BT, weights_BT, tokens.mask(ANSWER), tokens, capacity)

    def most(self, candidates, capacity):
        return None


def routed(selector):
    model = tiny_llava().eval()
    torch.manual_seed(1)
    return model, attach(model, {"depth": MixtureOfDepths(router=LinearRouter(std=0.5), selector=selector)})


@torch.no_grad()
def test_cached_answers_are_those_of_one_forward_under_the_rule_spelled_out():
    batch, steps = padded(ROWS, "left"), 6
    tokens = facts({**batch, "labels": torch.full_like(batch.pop("labels"), -100)})
    model, tape = routed(SelectBy(RANKED, RANKED, Threshold(RANKED.routes)))
    how = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with tape.about(tokens), tape.recording() as records:
        cached = model.generate(**batch, **how, return_dict_in_generate=True, output_logits=True)
    entered = torch.cat([r.decision.keep_BT() for r in records if r.tokens.phase == "decode"]).float().mean()
    assert 0.1 < entered < 0.9  # both ways are taken
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, steps), value=1)
    whole = {**batch, "input_ids": cached.sequences, "attention_mask": mask}
    model, tape = routed(ByKind())
    with tape.about(tokens):
        once = model(**whole, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached.logits, 1), once[:, -steps - 1 : -1], atol=1e-5, rtol=1e-5)
