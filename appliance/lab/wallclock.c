/* A wall clock that can be stepped under a running process: CLOCK_REALTIME plus the seconds that lie in the file $WALLCLOCK_OFFSET.
 * Preloaded by appliance.lab.faults.Clock. The file is mapped once, so a step is seen by the next call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;

__attribute__((constructor)) static void open_offset(void) {
    const char *path = getenv("WALLCLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        offset = mapped;
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real ? real(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && offset && is_wall(clock))
        now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    (void)zone;
    struct timespec wall;
    int failed = clock_gettime(CLOCK_REALTIME, &wall);
    if (!failed) {
        now->tv_sec = wall.tv_sec;
        now->tv_usec = wall.tv_nsec / 1000;
    }
    return failed;
}

time_t time(time_t *kept) {
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    if (kept)
        *kept = wall.tv_sec;
    return wall.tv_sec;
}
