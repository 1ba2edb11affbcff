/* hf3fs.c owns what programs written for 3FS do with its C interface, one sequence a command, on a real mount:
 *   cc hf3fs.c $(kvfs usrbio --print-flags) -o hf3fs && ./hf3fs where PATH
 * Each ends with 0 if everything was as 3FS promises it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <hf3fs_usrbio.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                    \
  do {                                                                                 \
    if (!(what)) {                                                                     \
      fprintf(stderr, "hf3fs.c:%d: %s, errno %s\n", __LINE__, #what, strerror(errno)); \
      exit(1);                                                                         \
    }                                                                                  \
  } while (0)

enum { MIB = 1 << 20, BLOCK = 256 << 10, BLOCKS = 24 };
static const uint8_t no_id[16];

static void fill(uint8_t* p, size_t n, unsigned seed) {
  for (size_t i = 0; i < n; ++i) p[i] = (uint8_t)((i * 2654435761u + seed * 40503u) >> 7 | 1);
}

static int matches(const uint8_t* p, size_t n, unsigned seed) {
  uint8_t* want = malloc(n);
  fill(want, n, seed);
  const int same = memcmp(p, want, n) == 0;
  free(want);
  return same;
}

static int64_t one(const struct hf3fs_ior* ior, const struct hf3fs_iov* iov, void* at, int fd, size_t off, size_t n) {
  const int slot = hf3fs_prep_io(ior, iov, ior->for_read, at, fd, off, n, at);
  if (slot < 0) return slot;
  CHECK(hf3fs_submit_ios(ior) == 0);
  struct hf3fs_cqe q;
  CHECK(hf3fs_wait_for_ios(ior, &q, 1, 1, NULL) == 1);
  CHECK(q.index == slot && q.userdata == at);
  return q.result;
}

/* Where a path lies: the mount point, or "none". */
static int where(const char* path) {
  char mp[256];
  const int n = hf3fs_extract_mount_point(mp, sizeof mp, path);
  const int fd = open(path, O_RDONLY);
  CHECK(fd < 0 || hf3fs_is_hf3fs(fd) == (n > 0));
  if (n > 0) {
    char small[4] = "abc";
    CHECK(n == (int)strlen(mp) + 1);
    CHECK(hf3fs_extract_mount_point(small, 4, path) == n && strcmp(small, "abc") == 0);
  }
  puts(n > 0 ? mp : "none");
  return 0;
}

/* A ring for each call; memory of the caller's own, wrapped with an id of zeros and unlinked at once; a file per block,
 * synced and closed. */
static int ring_per_call(const char* mp) {
  char name[64], path[512];
  snprintf(name, sizeof name, "/kvfs-interop-%d", (int)getpid());
  const int shm = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
  CHECK(shm >= 0 && ftruncate(shm, 2 * BLOCK) == 0);
  uint8_t* mem = mmap(NULL, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
  CHECK(mem != MAP_FAILED && shm_unlink(name) == 0);
  for (int round = 0; round < 3; ++round) {
    for (unsigned i = 0; i < BLOCKS; ++i) {
      struct hf3fs_iov iov;
      struct hf3fs_ior ior;
      snprintf(path, sizeof path, "%s/block-%u", mp, i);
      int fd = open(path, O_RDWR | O_CREAT, 0644);
      CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
      CHECK(hf3fs_iovwrap(&iov, mem, no_id, mp, 2 * BLOCK, 0, -1) == 0);
      CHECK(hf3fs_iorcreate4(&ior, mp, 16, false, 0, 0, -1, 0) == 0);
      fill(mem, BLOCK, i + 100u * (unsigned)round);
      CHECK(one(&ior, &iov, mem, fd, 0, BLOCK) == BLOCK);
      hf3fs_iordestroy(&ior);
      CHECK(fsync(fd) == 0);
      hf3fs_dereg_fd(fd);
      CHECK(close(fd) == 0);

      fd = open(path, O_RDONLY);
      CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
      CHECK(hf3fs_iorcreate4(&ior, mp, 16, true, 0, 0, -1, 0) == 0);
      memset(mem + BLOCK, 0, BLOCK);
      CHECK(one(&ior, &iov, mem + BLOCK, fd, 0, BLOCK) == BLOCK);
      CHECK(matches(mem + BLOCK, BLOCK, i + 100u * (unsigned)round));
      hf3fs_iordestroy(&ior);
      hf3fs_dereg_fd(fd);
      close(fd);
    }
  }
  return 0;
}

/* Per thread an iov and two rings, kept; per file open, register, one batch, deregister, close. */
static void* a_threads_files(void* argument) {
  const char* mp = ((char**)argument)[0];
  const int thread = atoi(((char**)argument)[1]);
  struct hf3fs_iov iov;
  struct hf3fs_ior reads, writes;
  char path[512];
  CHECK(hf3fs_iovcreate(&iov, mp, 8 * MIB, 0, -1) == 0);
  CHECK(hf3fs_iorcreate4(&reads, mp, 16, true, 0, 0, -1, 0) == 0);
  CHECK(hf3fs_iorcreate4(&writes, mp, 16, false, 0, 0, -1, 0) == 0);
  for (unsigned f = 0; f < 20; ++f) {
    const size_t n = 100000u + f * 50000u;
    snprintf(path, sizeof path, "%s/t%d-%u", mp, thread, f);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
    fill(iov.base, n, f * 7u + (unsigned)thread);
    CHECK(one(&writes, &iov, iov.base, fd, 0, n) == (int64_t)n);
    hf3fs_dereg_fd(fd);
    close(fd);
    fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
    memset(iov.base, 0, 2 * MIB);
    struct hf3fs_cqe q[8];
    size_t got = 0;
    for (int i = 0; i < 8; ++i)  // in eight pieces, the last short
      CHECK(hf3fs_prep_io(&reads, &iov, true, iov.base + (size_t)i * 256 * 1024, fd, (size_t)i * 256 * 1024, 256 * 1024,
                          NULL) >= 0);
    CHECK(hf3fs_submit_ios(&reads) == 0 && hf3fs_wait_for_ios(&reads, q, 8, 8, NULL) == 8);
    for (int i = 0; i < 8; ++i) got += (size_t)q[i].result;
    CHECK(got == n && matches(iov.base, n, f * 7u + (unsigned)thread));
    hf3fs_dereg_fd(fd);
    close(fd);
  }
  hf3fs_iordestroy(&writes);
  hf3fs_iordestroy(&reads);
  hf3fs_iovdestroy(&iov);
  return NULL;
}

static int rings_per_thread(const char* mp) {
  enum { THREADS = 12 };
  pthread_t t[THREADS];
  char number[THREADS][12];
  const char* argument[THREADS][2];
  for (int i = 0; i < THREADS; ++i) {
    snprintf(number[i], sizeof number[i], "%d", i);
    argument[i][0] = mp;
    argument[i][1] = number[i];
    CHECK(pthread_create(&t[i], NULL, a_threads_files, (void*)argument[i]) == 0);
  }
  for (int i = 0; i < THREADS; ++i) CHECK(pthread_join(t[i], NULL) == 0);
  return 0;
}

/* Another process's iov by its id, and what a forked child may go on using. */
static int two_processes(const char* mp) {
  char path[512];
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  snprintf(path, sizeof path, "%s/shared", mp);
  const int fd = open(path, O_RDWR | O_CREAT, 0644);
  CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
  CHECK(hf3fs_iovcreate(&iov, mp, MIB, 0, -1) == 0 && hf3fs_iorcreate(&ior, mp, 8, false, 0, -1) == 0);
  CHECK(one(&ior, &iov, iov.base, fd, 0, 10) == 10);
  for (int exec = 0; exec < 2; ++exec) {
    memset(iov.base, 0, MIB);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      struct hf3fs_ior own;
      struct hf3fs_iov opened;
      struct hf3fs_cqe q;
      CHECK(hf3fs_prep_io(&ior, &iov, false, iov.base, fd, 0, 1, NULL) == -ECHILD);  // the parent's
      CHECK(hf3fs_submit_ios(&ior) == -ECHILD && hf3fs_wait_for_ios(&ior, &q, 1, 0, NULL) == -ECHILD);
      CHECK(hf3fs_iorcreate(&own, mp, 8, false, 0, -1) == 0);
      if (exec == 0) {
        fill(iov.base, 1000, 5);
        CHECK(one(&own, &iov, iov.base, fd, 0, 1000) == 1000);
      } else {
        CHECK(hf3fs_iovopen(&opened, (const uint8_t*)iov.id, mp, MIB, 0, -1) == 0);
        fill(opened.base + 5000, 1000, 6);
        CHECK(one(&own, &opened, opened.base + 5000, fd, 1000, 1000) == 1000);
        hf3fs_iovdestroy(&opened);
      }
      hf3fs_iordestroy(&own);
      hf3fs_iordestroy(&ior);
      exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(matches(iov.base + exec * 5000, 1000, 5u + (unsigned)exec));  // the same memory
  }
  CHECK(one(&ior, &iov, iov.base, fd, 5000, 10) == 10);  // undisturbed
  uint8_t back[2000];
  CHECK(pread(fd, back, 2000, 0) == 2000 && matches(back, 1000, 5) && matches(back + 1000, 1000, 6));
  hf3fs_iordestroy(&ior);
  hf3fs_iovdestroy(&iov);
  return 0;
}

/* Ends without having destroyed anything. */
static int leave(const char* mp) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  CHECK(hf3fs_iovcreate(&iov, mp, MIB, 0, -1) == 0 && hf3fs_iorcreate(&ior, mp, 8, false, 0, -1) == 0);
  const pid_t child = fork();
  if (child == 0) exit(0);  // takes nothing of the parent's along
  int status;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  struct hf3fs_iov opened;
  CHECK(hf3fs_iovopen(&opened, (const uint8_t*)iov.id, mp, MIB, 0, -1) == 0);
  return 0;
}

/* The daemon is killed under operations: every call ends, and says so. */
static int killed(const char* mp, pid_t daemon) {
  char path[512];
  struct hf3fs_iov iov;
  struct hf3fs_ior ior, idle;
  struct hf3fs_cqe q[64];
  snprintf(path, sizeof path, "%s/doomed", mp);
  const int fd = open(path, O_RDWR | O_CREAT, 0644);
  CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0);
  CHECK(hf3fs_iovcreate(&iov, mp, 64 * BLOCK, 0, -1) == 0);
  CHECK(hf3fs_iorcreate(&ior, mp, 64, false, 0, -1) == 0 && hf3fs_iorcreate(&idle, mp, 64, true, 0, -1) == 0);
  int lost = 0;
  for (int round = 0; lost == 0; ++round) {
    for (size_t i = 0; i < 64; ++i)
      CHECK(hf3fs_prep_io(&ior, &iov, false, iov.base + i * BLOCK, fd, i * BLOCK, BLOCK, NULL) >= 0);
    CHECK(hf3fs_submit_ios(&ior) == 0);
    if (round == 3) CHECK(kill(daemon, SIGKILL) == 0);
    CHECK(hf3fs_wait_for_ios(&ior, q, 64, 64, NULL) == 64);
    for (int i = 0; i < 64; ++i) {
      CHECK(q[i].result == BLOCK || q[i].result == -EREMOTEIO);
      lost += q[i].result < 0;
    }
  }
  CHECK(hf3fs_wait_for_ios(&ior, q, 64, 1, NULL) == -EREMOTEIO);
  CHECK(hf3fs_wait_for_ios(&idle, q, 64, 1, NULL) == -EREMOTEIO);
  CHECK(one(&idle, &iov, iov.base, fd, 0, 4096) == -EREMOTEIO);
  struct hf3fs_ior more;
  struct hf3fs_iov memory;
  CHECK(hf3fs_iorcreate(&more, mp, 8, true, 0, -1) < 0 && hf3fs_iovcreate(&memory, mp, 4096, 0, -1) < 0);
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&ior);
  hf3fs_iordestroy(&idle);
  hf3fs_iovdestroy(&iov);
  return 0;
}

/* Random operations through the ring and through the mount on one file, against a model. */
static int mixed(const char* mp, unsigned seed, int count) {
  enum { SIZE = 3 * MIB };
  static uint8_t model[SIZE], seen[SIZE];
  char path[512];
  struct hf3fs_iov iov;
  struct hf3fs_ior reads, writes;
  size_t size = 0;
  snprintf(path, sizeof path, "%s/mixed-%u", mp, seed);
  const int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0644);
  CHECK(fd >= 0 && hf3fs_reg_fd(fd, 0) <= 0 && ftruncate(fd, SIZE) == 0 && ftruncate(fd, 0) == 0);
  const uint8_t* mapped = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
  CHECK(mapped != MAP_FAILED);
  CHECK(hf3fs_iovcreate(&iov, mp, SIZE, 0, -1) == 0);
  CHECK(hf3fs_iorcreate3(&reads, mp, 16, true, -4, 0, 1, -1) == 0);
  CHECK(hf3fs_iorcreate(&writes, mp, 16, false, 0, -1) == 0);
  srandom(seed);
  for (int i = 0; i < count; ++i) {
    const size_t off = (size_t)random() % SIZE;
    size_t n = 1 + (size_t)random() % (random() % 4 == 0 ? 300000 : 9000);
    if (n > SIZE - off) n = SIZE - off;
    const size_t end = off >= size ? off : size - off < n ? size : off + n, want = end - off;
    const int what = (int)(random() % 10);
    struct stat st;
    switch (what) {
      case 0:
      case 1:
      case 2:
        fill(iov.base, n, (unsigned)i);
        CHECK(one(&writes, &iov, iov.base, fd, off, n) == (int64_t)n);
        break;
      case 3:
        fill(iov.base, n, (unsigned)i);
        CHECK(pwrite(fd, iov.base, n, (off_t)off) == (ssize_t)n);
        break;
      case 4: {
        const size_t to = off + n;
        CHECK(hf3fs_punchhole(fd, 1, &off, &to, 0) == 0);
        memset(model + off, 0, want);
        break;
      }
      case 5:
        if (random() % 4 != 0) break;
        CHECK(ftruncate(fd, (off_t)off) == 0);
        if (off < size) memset(model + off, 0, size - off);
        size = off;
        break;
      case 6:
        memset(seen, 0x5a, n);
        CHECK(pread(fd, seen, n, (off_t)off) == (ssize_t)want && memcmp(seen, model + off, want) == 0);
        break;
      case 7:
        /* The kernel must have been asked for the size since the ring made the file grow, or it knows no page there. */
        CHECK(fstat(fd, &st) == 0);
        if (want != 0) CHECK(memcmp(mapped + off, model + off, want) == 0);
        break;
      default:
        memset(iov.base, 0x5a, n);
        CHECK(one(&reads, &iov, iov.base, fd, off, n) == (int64_t)want && memcmp(iov.base, model + off, want) == 0);
        break;
    }
    if (what <= 3) {
      memcpy(model + off, iov.base, n);
      if (off + n > size) size = off + n;
    }
    if (i % 16 == 0) CHECK(fstat(fd, &st) == 0 && (size_t)st.st_size == size);
    if (i % 64 == 0) CHECK(fsync(fd) == 0);
  }
  CHECK(pread(fd, seen, SIZE, 0) == (ssize_t)size && memcmp(seen, model, size) == 0);
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&reads);
  hf3fs_iordestroy(&writes);
  hf3fs_iovdestroy(&iov);
  return 0;
}

int main(int n, char** a) {
  const char* what = n > 1 ? a[1] : "";
  if (n == 3 && strcmp(what, "where") == 0) return where(a[2]);
  if (n == 3 && strcmp(what, "ring-per-call") == 0) return ring_per_call(a[2]);
  if (n == 3 && strcmp(what, "rings-per-thread") == 0) return rings_per_thread(a[2]);
  if (n == 3 && strcmp(what, "two-processes") == 0) return two_processes(a[2]);
  if (n == 3 && strcmp(what, "leave") == 0) return leave(a[2]);
  if (n == 4 && strcmp(what, "killed") == 0) return killed(a[2], atoi(a[3]));
  if (n == 5 && strcmp(what, "mixed") == 0) return mixed(a[2], (unsigned)atoi(a[3]), atoi(a[4]));
  if (n == 4 && strcmp(what, "hardlink") == 0) return hf3fs_hardlink(a[2], a[3]);
  fprintf(stderr, "usage: hf3fs where|ring-per-call|rings-per-thread|two-processes|leave|killed|mixed|hardlink ...\n");
  return 2;
}
