"""One flat buffer of weights, task vectors, and safetensors files in and out."""
