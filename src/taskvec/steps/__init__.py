"""What a study's steps do: each reads folders, writes one folder, and keeps nothing in memory.

Every function has the signature ``(config, inputs, out, progress)``: ``inputs`` are the folders of other steps by role.
``taskvec.plan`` has a module beside each of these, which says who reads what.
"""

from taskvec.steps.learning import (
    choose_learning_rate,
    choose_rate,
    finetune,
    finetune_joint,
    import_finetuned,
    pick_head,
    probe_task,
    zero_shot,
)
from taskvec.steps.loading import decode_task, decode_training, features, load_backbone, preprocessing
from taskvec.steps.measuring import (
    build_model,
    gains,
    heatmap,
    negate,
    own_accuracy,
    single_task_predictions,
    subset,
    test_task,
)
from taskvec.steps.merging import (
    agreement,
    choose_option,
    choose_scale,
    kept_curve,
    merge,
    per_task_scales,
    pick_merge,
    reestimate,
    reestimated_curve,
    reprobed_curve,
    surgery_curve,
)

MEANINGS = {
    load_backbone: 2,
    preprocessing: 1,
    decode_task: 3,
    decode_training: 3,
    features: 1,
    probe_task: 1,
    choose_rate: 1,
    pick_head: 1,
    zero_shot: 1,
    finetune: 2,
    finetune_joint: 1,
    import_finetuned: 2,
    choose_learning_rate: 2,
    merge: 2,
    choose_option: 2,
    pick_merge: 1,
    reestimate: 1,
    reestimated_curve: 1,
    per_task_scales: 3,
    kept_curve: 2,
    reprobed_curve: 3,
    surgery_curve: 2,
    agreement: 1,
    choose_scale: 1,
    test_task: 2,
    gains: 2,
    own_accuracy: 1,
    subset: 3,
    single_task_predictions: 2,
    heatmap: 2,
    build_model: 4,
    negate: 1,
}
"""Every step and the version of its meaning: raise it when the same configuration would give another result."""
VERSIONS = {function.__name__: version for function, version in MEANINGS.items()}
"""The same by name."""
