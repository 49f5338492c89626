"""Models, all on `tinygpt_kernels` ops."""
