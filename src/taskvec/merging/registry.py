"""Merging methods: short functions over one entry of all task vectors, in one registry (docs/methods.md)."""

from __future__ import annotations

from taskvec.merging.methods import adaptive, averaging, sparsity, spectral
from taskvec.merging.recipes import (
    ADDITION,
    METHODS,
    Method,
    Recipe,
    apply,
    find_method,
    find_recipe,
    register,
)

__all__ = [
    "ADDITION",
    "BUILT_IN",
    "METHODS",
    "Method",
    "Recipe",
    "apply",
    "find_method",
    "find_recipe",
    "register",
]

FIXED = "1:1:1"
"""The scales of methods that give merged weights themselves."""
WIDE = "0:3:0.15"
"""The scales of methods whose direction is shorter than the sum of the vectors."""
MIDDLE = "0:2:0.1"

register(
    Method(
        name=ADDITION,
        function=averaging.task_arithmetic,
        description="task addition: the sum of the task vectors",
        reference="Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="average",
        function=averaging.average,
        description="the mean of the fine-tuned weights",
        reference="Wortsman et al., Model soups, arXiv 2203.05482",
        scales=FIXED,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="ties",
        function=sparsity.ties,
        description="the largest entries, a sign elected for each, the mean of those that have it",
        reference="Yadav et al., TIES-Merging, arXiv 2306.01708",
        scales=MIDDLE,
        config=sparsity.Ties,
        survey=sparsity.trim_thresholds,
        laws=frozenset({"order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="dare",
        function=sparsity.dare,
        description="random entries dropped and the others scaled up; before any other method",
        reference="Yu et al., Language models are super Mario, arXiv 2311.03099",
        role="transform",
        config=sparsity.Dare,
        needs=frozenset({"seed"}),
        laws=frozenset({"homogeneous"}),
        elementwise=True,
    )
)
register(
    Method(
        name="della",
        function=sparsity.della,
        description="entries dropped by chance and magnitude, a sign elected for each, the sum of those that have it",
        reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
        scales=MIDDLE,
        config=sparsity.Della,
        needs=frozenset({"seed"}),
        laws=frozenset({"homogeneous"}),
    )
)
register(
    Method(
        name="breadcrumbs",
        function=sparsity.breadcrumbs,
        description="the entries of each tensor without outliers and without small ones; before any other method",
        reference="Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795",
        role="transform",
        config=sparsity.Breadcrumbs,
        laws=frozenset({"order", "homogeneous"}),
    )
)
register(
    Method(
        name="magmax",
        function=sparsity.magmax,
        description="of every entry the one with the largest magnitude",
        reference="Marczak et al., MagMax, arXiv 2407.06322",
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="consensus",
        function=sparsity.consensus,
        description="the sum of the vectors where at least two tasks use an entry",
        reference="Wang et al., Localizing task information, arXiv 2405.07813",
        config=sparsity.Consensus,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="tall_masks",
        function=sparsity.tall_masks,
        description="the sum of the vectors under a mask of each task",
        reference="Wang et al., Localizing task information, arXiv 2405.07813",
        scales=FIXED,
        role="per-task",
        config=sparsity.Tall,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
    )
)
register(
    Method(
        name="emr",
        function=sparsity.emr,
        description="one elected vector under a mask of each task, rescaled for each",
        reference="Huang et al., EMR-Merging, arXiv 2405.17461",
        scales=FIXED,
        role="per-task",
        survey=sparsity.emr_rescales,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
    )
)
register(
    Method(
        name="pcb",
        function=sparsity.pcb,
        description="the mean weighted by how important an entry is to its task and to the others",
        reference="Du et al., Parameter Competition Balancing, arXiv 2410.02396",
        scales=MIDDLE,
        config=sparsity.Pcb,
        survey=sparsity.importance,
        laws=frozenset({"order"}),
        elementwise=True,
    )
)
register(
    Method(
        name="tsv_m",
        function=spectral.tsv_m,
        description="the largest singular directions of every task, made orthogonal to each other",
        reference="Gargiulo et al., Task singular vectors, arXiv 2412.00081",
        scales=WIDE,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
    )
)
register(
    Method(
        name="iso_c",
        function=spectral.iso_c,
        description="the sum of the vectors with all singular values of a matrix made equal",
        reference="Marczak et al., No task left behind, arXiv 2502.04959",
        scales=WIDE,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
    )
)
register(
    Method(
        name="iso_cts",
        function=spectral.iso_cts,
        description="iso_c on shared directions and on every task's own",
        reference="Marczak et al., No task left behind, arXiv 2502.04959",
        scales=WIDE,
        config=spectral.IsoCts,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
    )
)
register(
    Method(
        name="wudi",
        function=spectral.wudi,
        description="matrices that disturb the inputs of every task least, by gradient descent",
        reference="Cheng et al., Whoever started the interference, arXiv 2503.08099",
        scales=MIDDLE,
        config=spectral.Wudi,
        laws=frozenset({"one task", "order"}),
        matrices=True,
    )
)
register(
    Method(
        name="lines",
        function=averaging.lines,
        description="vectors scaled up from the first layer to the last; before any other method",
        reference="Wang et al., LiNeS, arXiv 2410.17146",
        scales=MIDDLE,
        role="transform",
        config=averaging.Lines,
        laws=frozenset({"order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)
register(
    Method(
        name="slerp",
        function=averaging.slerp,
        description="two models along a great circle",
        reference="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
        scales=FIXED,
        config=averaging.Slerp,
        laws=frozenset({"order"}),
        tasks=2,
    )
)
register(
    Method(
        name="fisher",
        function=adaptive.fisher,
        description="the mean weighted by the Fisher information of each task",
        reference="Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        scales=FIXED,
        config=adaptive.Fisher,
        survey=adaptive.fisher_weights,
        needs=frozenset({"inputs", "heads", "seed"}),
        measure="taskvec.merging.methods.measuring:fisher",
        laws=frozenset({"one task", "order", "homogeneous"}),
    )
)
register(
    Method(
        name="regmean",
        function=adaptive.regmean,
        description="linear layers whose outputs are nearest to those of every task, by least squares",
        reference="Jin et al., Dataless knowledge fusion, arXiv 2212.09849",
        scales=FIXED,
        config=adaptive.Regmean,
        needs=frozenset({"inputs", "seed"}),
        measure="taskvec.merging.methods.measuring:grams",
        laws=frozenset({"one task", "order", "homogeneous"}),
    )
)
register(
    Method(
        name="adamerging",
        function=adaptive.adamerging,
        description="coefficients of each tensor and task with the least entropy of the predictions",
        reference="Yang et al., AdaMerging, arXiv 2310.02575",
        scales=FIXED,
        config=adaptive.Adamerging,
        needs=frozenset({"inputs", "heads", "seed"}),
        measure="taskvec.merging.methods.measuring:coefficients",
        laws=frozenset({"homogeneous"}),
    )
)

BUILT_IN = dict(METHODS)
"""The package's own methods, which its version identifies."""
