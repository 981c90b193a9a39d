"""What each method is: the facts that the rest asks for, in one table. How it works is in the files of its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to compress a model.

    Attributes:
        removes: takes redundant layers out whole, so that no compression ratio applies to it.
        bridges: puts low-rank bridges in their place.
        whole_model: spends one budget over all layers; which ones are redundant only says how large it is.
        refits: is built layer by layer, and re-fits what writes to the residual stream.
        attributes: chooses singular values by what gradients say of them.
        opens_experts: factorises single experts of a mixture; the others leave them whole.
        several_processes: can share its work among processes.
        importance: how its redundant layers are found, where it has its own way.
    """

    removes: bool = False
    bridges: bool = False
    whole_model: bool = False
    refits: bool = False
    attributes: bool = False
    opens_experts: bool = False
    several_processes: bool = False
    importance: str | None = None


METHODS = {
    # ours and the paper's
    "taco": Method(whole_model=True, refits=True, opens_experts=True, several_processes=True),
    "paper": Method(attributes=True, opens_experts=True),
    "removal": Method(removes=True, several_processes=True),
    "svd": Method(opens_experts=True),
    "bridge": Method(removes=True, bridges=True, refits=True, several_processes=True),
    # published ones to compare with (`baselines`)
    "sleb": Method(removes=True, importance="greedy"),
    "fwsvd": Method(),
    "asvd": Method(),
    "svd-llm": Method(),
    "zs-svd": Method(),
    "kfac": Method(),
    "modegpt": Method(),
    "replaceme": Method(removes=True, importance="runs"),
}
