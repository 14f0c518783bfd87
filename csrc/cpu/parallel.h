#pragma once

// A parallel region on OpenMP's pool. torch ships libgomp.so.1 under its plain name, so that this is
// the pool torch runs on and not a second one.

#include <omp.h>

#include <cstdint>
#include <new>

namespace bitkern::cpu {
extern bool forked;  // in the child of a fork, where OpenMP's pool does not exist

namespace BITKERN_ISA {
namespace {

struct Range {
  int64_t begin, end;
};

struct Team {
  int rank, size;

  Range share(int64_t total) const { return {total * rank / size, total * (rank + 1) / size}; }

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// As many of num_threads as get 2^15 of the `work` elements each, which is about where waking a
// thread costs what it saves.
inline int useful_threads(int num_threads, int64_t work) {
  const int64_t useful = work >> 15;
  if (forked || useful <= 1 || num_threads <= 1) return 1;
  return useful < num_threads ? int(useful) : num_threads;
}

// Runs body(team) on a team of at most `threads`.
template <class Body>
void parallel(int threads, Body&& body) {
  if (threads == 1) return body(Team{0, 1});
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Uninitialised scratch memory, aligned to a cache line.
struct Scratch {
  static constexpr std::align_val_t LINE{64};
  float* const data;

  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(::operator new(floats * sizeof(float), LINE))) {}
  ~Scratch() { ::operator delete(data, LINE); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
}  // namespace BITKERN_ISA
}  // namespace bitkern::cpu
