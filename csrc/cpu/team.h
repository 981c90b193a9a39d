// The threads of a call: one region of the OpenMP runtime that the process already has. Compiled for every CPU.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"

namespace taco {

#ifdef _OPENMP
#define TACO_BARRIER _Pragma("omp barrier")
#else
#define TACO_BARRIER
#endif

// body(index, threads) on `team` threads at once; alone where that is one, without a region.
template <class Body>
void on_team(int team, const Body& body) {
#ifdef _OPENMP
  if (team > 1) {
#pragma omp parallel num_threads(team)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// The only meeting point of the threads of a region. An orphaned barrier binds to the region it is called from; with
// one thread there is none, and it returns at once.
inline void meet() {
  TACO_BARRIER
}

// A thread's share of packing columns of which `width` share a place, in whole vectors of places.
inline void pack_share(void (*pack)(const Packing&, std::int64_t, std::int64_t), int width, const Packing& p, int index,
                       int members) {
  const std::int64_t places = (p.columns + width - 1) / width, vectors = (places + kGroup - 1) / kGroup;
  const std::int64_t end = vectors * (index + 1) / members * kGroup;
  pack(p, vectors * index / members * kGroup, end < places ? end : places);
}
inline void pack_share(const ManyRows& many, const Packing& p, int index, int members) {
  pack_share(many.pack, many.width, p, index, members);
}

}  // namespace taco
