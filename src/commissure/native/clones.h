// What the bindings of kernels compiled once per instruction set share: the choice of a clone, and threads.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace commissure {

// Starting a thread costs some 20 microseconds: each must have more floating-point operations to do than that.
constexpr double kWorkPerThread = 5e6;

template <class Kernel>
struct Clone {
    std::string name;
    const Kernel* kernel;
};

// Whether this machine can run x86-64-v3 or -v4.
inline bool runs_v3() {
#if COMMISSURE_HAS_V3
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}
inline bool runs_v4() {
#if COMMISSURE_HAS_V4
    return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

// The clone `name`, the last where it is empty.
template <class Kernel>
const Kernel& choose(const std::vector<Clone<Kernel>>& clones, const std::string& name) {
    if (name.empty()) return *clones.back().kernel;
    for (const Clone<Kernel>& clone : clones)
        if (clone.name == name) return *clone.kernel;
    throw nanobind::value_error(("this machine or build has no clone '" + name + "'").c_str());
}

// Call `run` on as many threads as there is work for: at most `threads`, at most one a task.
template <class Run>
void share_out(double work, int64_t tasks, int threads, const Run& run) {
    int64_t wanted = int64_t(work / kWorkPerThread);
    wanted = wanted < tasks ? wanted : tasks;
    wanted = wanted < threads ? wanted : threads;
    std::atomic<bool> is_full{false};
    const auto guarded = [&] {
        try {
            run();
        } catch (const std::bad_alloc&) {
            is_full = true;
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(guarded);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all the work
    }
    guarded();
    for (std::thread& helper : helpers) helper.join();
    if (is_full) throw std::bad_alloc();
}

}  // namespace commissure
