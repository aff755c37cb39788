// Code between the two marks rounds every operation by itself: the compiler may not fuse a
// multiplication and an addition there, so that bits equal those of a definition in PyTorch.
#pragma once
#if defined(__clang__)
#define EXACT_BEGIN _Pragma("clang fp contract(off)")
#define EXACT_END _Pragma("clang fp contract(fast)")
#else
#define EXACT_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"-ffp-contract=off\")")
#define EXACT_END _Pragma("GCC pop_options")
#endif
