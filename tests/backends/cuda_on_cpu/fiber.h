// A function that can stop in its midst: resume() runs it until it calls stop() or returns. One OS
// thread, one resume() at a time.

#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

class Fiber {
 public:
  void start(std::function<void()> function) {
    body = std::move(function);
    getcontext(&inside);
    inside.uc_stack.ss_sp = stack.get();
    inside.uc_stack.ss_size = STACK;
    makecontext(&inside, enter, 0);
  }

  void resume() {
    current = this;
    leave(&outside_sanitized, stack.get(), STACK);
    swap(outside, inside);
    arrive(outside_sanitized, nullptr, nullptr);
  }

  void stop() {
    leave(&inside_sanitized, outside_stack, outside_size);
    swap(inside, outside);
    arrive(inside_sanitized, &outside_stack, &outside_size);
  }

 private:
  static void enter() {
    Fiber& me = *current;
    arrive(nullptr, &me.outside_stack, &me.outside_size);
    me.body();
    leave(nullptr, me.outside_stack, me.outside_size);  // for good
    swap(me.inside, me.outside);
  }

#ifdef __SANITIZE_ADDRESS__
  static void leave(void** save, const void* to, size_t size) {
    __sanitizer_start_switch_fiber(save, to, size);
  }
  static void arrive(void* saved, const void** from, size_t* size) {
    __sanitizer_finish_switch_fiber(saved, from, size);
  }
  // The sanitizer's own swapcontext forgets where the variables of the stack end.
  static void swap(ucontext_t& from, const ucontext_t& to) {
    static const auto swapcontext_of_libc = reinterpret_cast<decltype(&swapcontext)>(
        dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
    swapcontext_of_libc(&from, &to);
  }
#else
  static void leave(void**, const void*, size_t) {}
  static void arrive(void*, const void**, size_t*) {}
  static void swap(ucontext_t& from, const ucontext_t& to) { swapcontext(&from, &to); }
#endif

  static constexpr size_t STACK = 256 << 10;
  static inline Fiber* current = nullptr;

  std::function<void()> body;
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t inside, outside;
  void *inside_sanitized = nullptr, *outside_sanitized = nullptr;  // the sanitizer's of each stack
  const void* outside_stack = nullptr;
  size_t outside_size = 0;
};

}  // namespace cuda_on_cpu
