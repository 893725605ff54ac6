// For code that host and device share.
#pragma once

#ifndef EQUIFAST_HD
#ifdef __CUDACC__
#define EQUIFAST_HD __host__ __device__
#elif defined(EQUIFAST_ISA)
// Compiled several times for several instruction sets: an out-of-line copy would be merged by the linker with
// that of another set, and run where it cannot.
#define EQUIFAST_HD __attribute__((always_inline))
#else
#define EQUIFAST_HD
#endif
#endif
