// Loops that run at the width of the processor at hand.
#pragma once

// FUSED_OPS_VECTORIZED before a function: it and all it calls are compiled once for each instruction set, and the
// dynamic loader picks one for the processor, so one build runs on all and fast on each.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FUSED_OPS_VECTORIZED __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSED_OPS_VECTORIZED
#endif
