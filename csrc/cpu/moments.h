#pragma once

// Mean and sum of squared deviations, by Chan, Golub and LeVeque's pairwise update (1979): one read
// of the data, and no cancellation however far the mean is from zero. Equal values have exactly
// their mean and exactly no deviation.

#include "vec.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

// Merges ROWS values per lane into the moments of the `count` values per lane seen so far.
template <int ROWS>
inline void merge(const Vec (&values)[ROWS], float count, Vec& mean, Vec& m2) {
  Vec sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = values[r];
  for (int half = ROWS / 2; half > 0; half /= 2) {
    for (int r = 0; r < half; ++r) sums[r] += sums[r + half];
  }
  const Vec local = sums[0] * (1.0f / ROWS);
  Vec squares[2] = {};
  for (int r = 0; r < ROWS; ++r) {
    const Vec deviation = values[r] - local;
    squares[r % 2] = fma(deviation, deviation, squares[r % 2]);
  }
  const float share = ROWS / (count + ROWS);
  const Vec delta = local - mean;
  mean = fma(delta, broadcast(share), mean);
  m2 += squares[0] + squares[1] + delta * (delta * (count * share));
}

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Moments& other) {
    const double delta = other.mean - mean;
    const double share = other.count / (count + other.count);
    mean += delta * share;
    m2 += other.m2 + delta * (delta * (count * share));
    count += other.count;
  }
};

// Moments of `sets` sets of `count` values each, from the moments of the sets.
template <class Real>
inline Moments moments_of_sets(const Real* mean, const Real* m2, int64_t sets, double count) {
  double sum = 0, between = 0, within = 0;
  for (int64_t i = 0; i < sets; ++i) sum += mean[i];
  const double center = sum / sets;
  for (int64_t i = 0; i < sets; ++i) {
    between += (mean[i] - center) * (mean[i] - center);
    within += m2[i];
  }
  return {count * sets, center, within + count * between};
}

// Moments of `length` > 0 values, read in order by read_at(offset, lanes). The first value is
// subtracted from all: a running mean far from zero would lose some of its last bits with each
// update.
template <class Read>
inline Moments moments(int64_t length, Read&& read_at) {
  const float origin = read_at(0, 1)[0];
  const auto load_at = [&](int64_t i, auto lanes) { return read_at(i, lanes) - broadcast(origin); };
  constexpr int ROWS = 8;
  const int64_t rows = length / WIDTH;
  Vec mean = {}, m2 = {};
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) {
    Vec values[ROWS];
    for (int r = 0; r < ROWS; ++r) values[r] = load_at((row + r) * WIDTH, AllLanes{});
    merge(values, float(row), mean, m2);
  }
  for (; row < rows; ++row) {
    const Vec values[1] = {load_at(row * WIDTH, AllLanes{})};
    merge(values, float(row), mean, m2);
  }
  float lanes[2][WIDTH] = {};
  Moments result;
  if (rows > 0) {
    store(lanes[0], mean);
    store(lanes[1], m2);
    result = moments_of_sets(lanes[0], lanes[1], WIDTH, double(rows));
  }
  if (const int tail = int(length % WIDTH)) {
    store(lanes[0], load_at(rows * WIDTH, tail));
    store(lanes[1], Vec{});
    result.merge(moments_of_sets(lanes[0], lanes[1], tail, 1));
  }
  result.mean += origin;
  return result;
}

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
