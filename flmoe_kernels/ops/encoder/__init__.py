"""The fused row-wise and dense operators of the fusion encoder; internal to interaction_moe."""
