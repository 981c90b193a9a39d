// Stands in for the OpenMP runtime in builds for ThreadSanitizer (TACO_SANITIZE=thread), and in no other.
// The sanitizer cannot see inside a runtime that is not instrumented: it would take every value that one thread writes
// before a barrier and another reads after it for a race. Here threads and barriers are pthread's own, which it knows.
#include <pthread.h>

#include <thread>
#include <vector>

namespace {

struct Team {
  pthread_barrier_t barrier;
  int size;
};

thread_local Team* team = nullptr;
thread_local int number = 0;

}  // namespace

// What gcc's -fopenmp calls; the names and signatures are libgomp's. Hidden, so that this library's calls come here
// although torch has brought the real ones into the process.
#define TACO_RUNTIME extern "C" __attribute__((visibility("hidden")))

TACO_RUNTIME int omp_get_thread_num() { return number; }
TACO_RUNTIME int omp_get_num_threads() { return team ? team->size : 1; }
TACO_RUNTIME int omp_get_max_threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

TACO_RUNTIME void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

TACO_RUNTIME void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int size = threads ? static_cast<int>(threads) : omp_get_max_threads();
  Team mine;
  mine.size = size;
  pthread_barrier_init(&mine.barrier, nullptr, static_cast<unsigned>(size));
  const auto member = [&](int index) {
    Team* const outer = team;
    const int before = number;
    team = &mine;
    number = index;
    body(data);
    team = outer;
    number = before;
  };
  std::vector<std::thread> others;
  for (int index = 1; index < size; ++index) others.emplace_back(member, index);
  member(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&mine.barrier);
}
