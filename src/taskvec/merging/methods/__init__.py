"""The merging methods: short functions over one entry of all task vectors."""
