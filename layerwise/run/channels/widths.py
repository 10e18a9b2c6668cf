"""Number of channels kept at every site of a model, by a rule or by optimisation.

=========  ==========================================================================
rule       channels that are removed
=========  ==========================================================================
optimal    those of least growth of the loss, by error curves and measured gains
uniform    the same fraction of every site, larger where other parameters must stay;
           the ratios of FASP, and UL-UM of FLAP
ul-mm      FLAP: a number of heads per layer, channels of the MLP make up the rest
al-mm      FLAP: the same totals, ranked over all layers
al-am      FLAP: heads and channels in one ranking over all layers
           al-am:compat: as its published code cuts that ranking, with its defects
=========  ==========================================================================

``ul-mm`` and ``al-mm`` take the number of heads of keys and values over all layers after a
colon, ``ul-mm:8``; by default it is the number of ``uniform``. The rules of FLAP count
single units, whatever the `multiple` of the run. In all rules channels of the MLP fill the
rest of the budget that whole heads cannot meet exactly.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from layerwise.errors import UsageError
from layerwise.run.channels.allocate import Allocation, Curve, allocate
from layerwise.run.channels.findings import Finding
from layerwise.run.channels.rankings import Units, al_am, al_mm, raised_fraction, ul_mm
from layerwise.run.channels.sites import Site
from layerwise.run.channels.structure import Structure

RULES = ("optimal", "uniform", "ul-mm", "al-mm", "al-am")
COMPAT_RULE = "al-am:compat"
WITH_COUNT = ("ul-mm", "al-mm")
ALIKE = ("optimal", "uniform", "ul-mm")  # rules that can make all blocks alike
COARSE = "heads"
ROUNDING = 1e-9  # of a number of units
LEAST_SENSITIVITY = 1e-3  # of the median, in place of negative ones, which are chance


def rule_of(structure: Structure, method: str) -> tuple[str, int | None]:
    """Rule and number of heads of a run, checked against its format."""
    allocation = structure.allocation or default_rule(structure, method)
    rule, colon, count = allocation.partition(":")
    counted = rule in WITH_COUNT and count.isdigit()
    if allocation not in (*RULES, COMPAT_RULE) and not counted:
        message = (
            f"allocation is one of {', '.join(RULES)}, {COMPAT_RULE}, or ul-mm and al-mm "
            f"with a number of heads as in ul-mm:8; got {allocation!r}"
        )
        raise UsageError(message)
    if structure.format == "stock" and rule not in ALIKE:
        message = (
            f"allocation {rule} gives every block its own width, which the stock format "
            f"has no place for; choose format native or padded, or allocation uniform"
        )
        raise UsageError(message)
    if allocation == COMPAT_RULE:
        return COMPAT_RULE, None
    return rule, int(count) if colon else None


def default_rule(structure: Structure, method: str) -> str:
    """Default rule of a method."""
    if method == "columns":
        return "optimal"
    return "al-am" if method == "flap" and structure.format != "stock" else "uniform"


def check_reachable(structure: Structure, sites: Sequence[Site], total: int) -> None:
    """Refuse a sparsity that exceeds all channels that can be removed.

    Raises
    ------
    UsageError
        The sparsity is too high; the message gives the largest possible one.
    """
    raised_fraction([_units(site) for site in sites], structure.sparsity, total)


def is_forced(structure: Structure, sites: Sequence[Site]) -> bool:
    """Whether all widths follow from the sparsity alone, whatever a survey would find.

    The stock format has one width for all channels of a kind. With one kind of sites, all
    alike, that is the largest width by which enough is removed.
    """
    alike = {(s.coupling.name, s.rounds, s.heads, s.channels.cost) for s in sites}
    free = all(site.allowed is None for site in sites)
    return structure.format == "stock" and len(alike) == 1 and free


def choose_widths(
    structure: Structure,
    method: str,
    sites: Sequence[Site],
    total: int,
    findings: Mapping[str, Finding],
) -> tuple[dict[str, int], Allocation | None]:
    """Number of kept units per head by site, and the allocation if it was optimised.

    Parameters
    ----------
    structure, method
        The requested structure, and the name of the method.
    sites
        All sites in the order of the model.
    total
        Number of parameters of all blocks; the sparsity is a fraction of it.
    findings
        Findings of the survey; empty for rules that need none, and for forced widths.
    """
    rule, heads = rule_of(structure, method)
    allocation = None
    if rule == "optimal" and is_forced(structure, sites):
        rule = "uniform"
    if rule == "optimal":
        allocation = _optimal(structure, sites, total, findings)
        removed = allocation.removed
    elif rule == "uniform":
        removed = _uniform(structure, sites, total)
    else:
        removed = _published(rule, heads, structure, sites, total, findings)
    keep = {site.name: site.rounds - removed[site.name] for site in sites}
    for site in sites:
        if site.allowed is not None and keep[site.name] not in site.allowed:
            possible = ", ".join(map(str, sorted(site.allowed)))
            message = (
                f"{site.name} would keep {keep[site.name]}, but the stock format accepts "
                f"{possible}: choose format native, pattern columns or another allocation"
            )
            raise UsageError(message)
    return keep, allocation


def _optimal(
    structure: Structure,
    sites: Sequence[Site],
    total: int,
    findings: Mapping[str, Finding],
) -> Allocation:
    scales = _sensitivities(sites, findings)
    losses = {}
    for site in sites:
        errors = findings[site.name].errors
        assert errors is not None
        losses[site.name] = (errors - errors[0]) * scales[site.name]
    worse = 2 * sum(float(loss.abs().max()) for loss in losses.values()) + 1
    curves = []
    for site in sites:
        if site.allowed is not None:  # widths that no configuration has get the worst loss
            kept = [site.rounds - count for count in range(len(losses[site.name]))]
            impossible = torch.tensor([n > 0 and n not in site.allowed for n in kept])
            losses[site.name] = losses[site.name] + worse * impossible
        cost = float(site.channels.cost * site.heads)
        curves.append(Curve(site.name, site.coupling.name, losses[site.name], cost))
    tie = "kind" if structure.format == "stock" else None
    return allocate(
        curves,
        structure.sparsity * total,
        tie=tie,  # type: ignore[arg-type]
        multiple={site.coupling.name: _multiple(structure, site) for site in sites},
    )


def _sensitivities(
    sites: Sequence[Site], findings: Mapping[str, Finding]
) -> dict[str, float]:
    """Growth of the loss per unit of error, above zero at every site."""
    ratios = {}
    for site in sites:
        finding = findings[site.name]
        assert finding.errors is not None
        error = float(finding.errors[finding.probed] - finding.errors[0])
        ratios[site.name] = finding.gain / error if error > 0 else 0.0
    positive = [value for value in ratios.values() if value > 0]
    least = LEAST_SENSITIVITY * median(positive) if positive else 1.0
    return {name: max(value, least) for name, value in ratios.items()}


def _multiple(structure: Structure, site: Site) -> int:
    """Number that must divide the width of a site; 1 if the site is not wider."""
    return structure.multiple if 1 < structure.multiple < site.rounds else 1


def _uniform(structure: Structure, sites: Sequence[Site], total: int) -> dict[str, int]:
    """Same fraction everywhere, rounded; the kind of the finest steps fills the rest."""
    share = raised_fraction([_units(site) for site in sites], structure.sparsity, total)
    rest = structure.sparsity * total
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.coupling.name, []).append(site)
    kinds = sorted(by_kind.values(), key=lambda members: _step(structure, members[0]))
    removed: dict[str, int] = {}
    for members in kinds[:0:-1]:
        for site in members:
            multiple = _multiple(structure, site)
            kept = -(-site.rounds * (1 - share) // multiple) * multiple
            kept = min(max(int(kept), 1), site.rounds)
            if site.allowed is not None:
                kept = min(n for n in site.allowed if n >= kept)
            removed[site.name] = site.rounds - kept
            rest -= removed[site.name] * site.channels.cost * site.heads
    available = sum(site.channels.cost * site.channels.units for site in kinds[0])
    for site in kinds[0]:
        multiple = _multiple(structure, site)
        kept = math.floor(site.rounds * (1 - rest / available) + ROUNDING)
        kept = kept // multiple * multiple
        if kept < 1:
            message = (
                f"{site.name} would keep no channels: ask for a lower sparsity, a smaller "
                f"multiple than {structure.multiple}, or a format and pattern that can "
                f"remove more"
            )
            raise UsageError(message)
        removed[site.name] = site.rounds - min(kept, site.rounds)
    return removed


def _step(structure: Structure, site: Site) -> float:
    """Smallest share of a site that can be removed."""
    return _multiple(structure, site) / site.rounds


def _published(
    rule: str,
    heads: int | None,
    structure: Structure,
    sites: Sequence[Site],
    total: int,
    findings: Mapping[str, Finding],
) -> dict[str, int]:
    units = [_units(site, findings.get(site.name)) for site in sites]
    share = raised_fraction(units, structure.sparsity, total)
    if rule in ("al-am", COMPAT_RULE):
        return al_am(units, share, compat=rule == COMPAT_RULE)
    coarse = [site for site in sites if site.coupling.name == COARSE]
    if not coarse:
        message = f"allocation {rule} counts heads: choose pattern heads"
        raise UsageError(message)
    if heads is None:
        heads = sum(int(share * site.rounds) for site in coarse)
    chosen = ul_mm if rule == "ul-mm" else al_mm
    return chosen(units, share, {COARSE: heads})


def _units(site: Site, finding: Finding | None = None) -> Units:
    """Units of a site for the rules; without a finding all scores are equal."""
    scores = torch.zeros(site.rounds)
    if finding is not None:
        columns = site.channels.groups.argsort(stable=True)
        scores = finding.scores[columns].view(site.channels.units, -1)
        if site.heads > 1:  # all heads lose their next unit together
            by_head = scores.mean(dim=1).view(site.heads, -1)
            scores = by_head.sort(dim=1).values.T
    cost = float(site.channels.cost * site.heads)
    return Units(site.name, site.block, site.coupling.name, scores, cost)
