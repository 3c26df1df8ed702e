// A few threads that share the items of one job at a time.
//
// A job is over when its items are done, not when every thread has come by: a thread that the system
// has taken off its core holds up at most the item it works on. That is what an engine needs that
// shares its cores with gateways, proxies and clients; a fork-join team waits for all of its members.
//
// Where the products are left to a library that runs on OpenMP, two sets of idle threads would fight
// for the cores. There the pool borrows OpenMP's team, through the entry point it is given.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenloom {

// GOMP_parallel of libgomp's interface: runs f(data) on so many threads and waits for all of them.
using Team = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);
using Work = void (*)(void* context, int item);

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

class Pool {
   public:
    static constexpr int ITEMS_MAX = (1 << 20) - 1;
    static constexpr int THREADS_MAX = 256;
    // How long an idle thread keeps its core: longer than the pause between two operations of a step.
    static constexpr std::chrono::microseconds SPIN{60};

    Pool(int threads, Team team) : threads_(threads), team_(team) {
        if (team_) return;
        for (int number = 1; number < threads && number < THREADS_MAX; ++number)
            helpers_.emplace_back([this] { help(); });
    }

    ~Pool() {
        over_.store(true);
        bell_.fetch_add(1);
        bell_.notify_all();
        for (auto& helper : helpers_) helper.join();
    }

    int threads() const { return threads_; }

    // Nanoseconds by kind of work since the pool was made, for whoever asks where a step's time goes.
    enum Part { PRODUCTS, ATTENTION, PLACE, NORMS, GATES, SINGLE_PRODUCTS, PARTS };
    int64_t spent_ns[PARTS] = {};

    // Runs work(context, 0 … items - 1), in any order, and returns when all are done.
    void run(int items, Work work, void* context) {
        if (items <= 1 || threads_ <= 1) {
            for (int item = 0; item < items; ++item) work(context, item);
            return;
        }
        work_ = work;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 40) + 1;
        ticket_.store(epoch << 40 | static_cast<uint64_t>(items) << 20, std::memory_order_release);
        if (team_) {
            team_([](void* pool) { static_cast<Pool*>(pool)->take_items(); }, this,
                  static_cast<unsigned>(threads_), 0);
            return;
        }
        bell_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst) > 0) bell_.notify_all();
        take_items();
        for (int turn = 0; done_.load(std::memory_order_acquire) < items; ++turn) {
            if (turn < 4096)
                relax();
            else
                sched_yield();
        }
    }

   private:
    // One number says which job it is, how many items it has, and which is the next: a thread that
    // comes late reads all three at once and never mistakes one job's items for another's.
    void take_items() {
        for (;;) {
            const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
            const int items = static_cast<int>(ticket >> 20 & ITEMS_MAX);
            const int item = static_cast<int>(ticket & ITEMS_MAX);
            if (item >= items) return;
            // This item is not done yet, so neither is the job: what it is made of stays as it is.
            work_(context_, item);
            done_.fetch_add(1, std::memory_order_acq_rel);
        }
    }

    void help() {
        uint32_t heard = bell_.load();
        while (!over_.load(std::memory_order_relaxed)) {
            take_items();
            const auto until = std::chrono::steady_clock::now() + SPIN;
            bool rang = false;
            while (!rang && std::chrono::steady_clock::now() < until) {
                for (int turn = 0; turn < 32 && !rang; ++turn) {
                    relax();
                    rang = bell_.load(std::memory_order_acquire) != heard;
                }
            }
            if (!rang) {
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                bell_.wait(heard);
                asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            heard = bell_.load();
        }
    }

    const int threads_;
    const Team team_;
    std::vector<std::thread> helpers_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<uint32_t> bell_{0};
    std::atomic<int> asleep_{0};
    std::atomic<bool> over_{false};
    Work work_ = nullptr;
    void* context_ = nullptr;
};

// Adds its own lifetime to one part of a pool's account.
class Spent {
   public:
    Spent(Pool& pool, Pool::Part part) : into_(pool.spent_ns[part]), began_(Clock::now()) {}
    ~Spent() { into_ += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began_).count(); }
    Spent(const Spent&) = delete;
    Spent& operator=(const Spent&) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    int64_t& into_;
    const Clock::time_point began_;
};

template <class F>
void parallel(Pool& pool, int items, F&& f) {
    pool.run(
        items, [](void* context, int item) { (*static_cast<F*>(context))(item); }, &f);
}

}  // namespace tokenloom
