// The CPU kernels under the thread sanitizer, called by two threads at once with a team each, and
// compared bit for bit with one thread. libgomp synchronises in ways that the sanitizer cannot see,
// so its entry points that the kernels use are here, on standard threads. See `make sanitize`.

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "bitkern/operators.h"

namespace {

struct Team {
  int size;
  std::barrier<> barrier;
};
thread_local Team* team;
thread_local int rank;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team here{int(threads), std::barrier<>(threads)};
  std::vector<std::thread> pool;
  for (int i = 0; i < here.size; ++i) {
    pool.emplace_back([&, i] {
      team = &here;
      rank = i;
      body(data);
    });
  }
  for (auto& thread : pool) thread.join();
}
void GOMP_barrier() { team->barrier.arrive_and_wait(); }
int omp_get_thread_num() { return rank; }
int omp_get_num_threads() { return team->size; }

}  // extern "C"

namespace bitkern::cpu {

bool forked = false;

namespace baseline {
BITKERN_CPU_OPERATORS(BITKERN_DECLARE_CPU)
}  // namespace baseline

namespace {

using Floats = std::vector<float>;

Floats random(size_t n, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(1, 2);
  Floats values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

// Everything that the operators return for one shape, one after the other.
Floats group_norm(int64_t batch, bool channels_last, bool adds, int threads) {
  const int64_t channels = 96, pixels = 41 * 41, groups = 8, n = batch * channels * pixels;
  const GroupNormActProblem problem{batch, channels, pixels, groups, channels_last, false,
                                    DType::float32, DType::float32, DType::float32,
                                    Activation::relu};
  const Floats x = random(n, 0), residual = random(n, 1), dy = random(n, 2), dsummed = random(n, 3);
  const Floats weight = random(channels, 4), bias = random(channels, 5);
  const float* const shortcut = adds ? dsummed.data() : nullptr;
  Floats out(4 * n + 2 * batch * groups + 2 * channels);
  float* const summed = out.data();
  float *const y = summed + n, *const dx = y + n, *const dshortcut = dx + n;
  float *const mean = dshortcut + n, *const rstd = mean + batch * groups;
  float* const dweight = rstd + batch * groups;
  baseline::group_norm_act_forward(
      problem,
      {x.data(), residual.data(), weight.data(), bias.data(), shortcut, 1e-5f, summed, y, mean,
       rstd, false},
      threads);
  baseline::group_norm_act_backward(
      problem,
      {dy.data(), dsummed.data(), summed, shortcut ? y : nullptr, weight.data(), bias.data(), mean,
       rstd, dx, shortcut ? dshortcut : nullptr, dweight, dweight + channels},
      threads);
  return out;
}

Floats weight_standardize(bool channels_last, int threads) {
  const int64_t filters = 70, inner = 65, taps = 9, layers = 3, n = filters * inner * taps;
  const WeightStandardizeProblem problem{1e-5f, false, false, DType::float32, DType::float32};
  const Floats weights = random(layers * n, 6), gains = random(filters, 7);
  const Floats douts = random(layers * n, 8);
  Floats out(layers * (2 * n + 3 * filters));
  std::vector<WeightStandardizeLayer> table;
  for (int64_t i = 0; i < layers; ++i) {
    float* const mine = out.data() + i * (2 * n + 3 * filters);
    float* const stats = mine + 2 * n;
    table.push_back({filters, inner, taps, 0.5f, false, channels_last, weights.data() + i * n,
                     gains.data(), stats, stats + filters, mine, douts.data() + i * n, mine + n,
                     stats + 2 * filters});
  }
  baseline::weight_standardize_forward(problem, {table.data(), layers}, threads);
  baseline::weight_standardize_backward(problem, {table.data(), layers}, threads);
  return out;
}

void check(int threads) {
  for (const bool channels_last : {false, true}) {
    for (const int64_t batch : {1, 3, 4}) {
      for (const bool adds : {false, true}) {
        const auto run = [=](int team) { return group_norm(batch, channels_last, adds, team); };
        if (run(threads) == run(1)) continue;
        std::printf("group_norm_act depends on the threads\n");
        std::exit(1);
      }
    }
    if (weight_standardize(channels_last, threads) == weight_standardize(channels_last, 1)) continue;
    std::printf("weight_standardize depends on the threads\n");
    std::exit(1);
  }
}

}  // namespace
}  // namespace bitkern::cpu

int main() {
  std::thread other(bitkern::cpu::check, 3);
  bitkern::cpu::check(4);
  other.join();
  std::printf("no races\n");
}
