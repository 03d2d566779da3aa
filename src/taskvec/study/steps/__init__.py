"""What a study's steps do: each reads folders, writes one folder, and keeps nothing in memory.

Every function has the signature ``(config, inputs, out, progress)``: ``inputs`` are the folders of other steps by role.
``taskvec.study.plan.experiments`` has a module beside each of these, which says who reads what.
"""
