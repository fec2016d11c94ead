/*
 * Makes load on a directory for scripts/bench, with operations that fio lacks. It is written in C, because a slow
 * client hides the cost of the server.
 *
 * Every command prints "OPERATIONS SECONDS". SECONDS on the command line is the duration; 0 means one pass.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int open_directory(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY);
    if (fd < 0)
        err(1, "open %s", name);
    return fd;
}

static void report(double operations, double seconds)
{
    printf("%.0f %.9f\n", operations, seconds);
}

/* Makes one pass of a job over its files; returns the number of operations. */
typedef long pass(int directory, int job, int jobs);

/* The jobs are processes: threads would contend for one table of descriptors. */
static void run_jobs(pass *one_pass, int directory, int jobs, double seconds)
{
    struct shared {
        volatile double end;
        volatile long operations;
    } *results = mmap(NULL, jobs * sizeof *results, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (results == MAP_FAILED)
        err(1, "mmap");
    if (jobs == 1) {
        double start = now();
        do {
            results->operations += one_pass(directory, 0, 1);
            results->end = now();
        } while (results->end - start < seconds);
        report(results->operations, results->end - start);
        return;
    }
    int gate[2];
    if (pipe(gate) < 0)
        err(1, "pipe");
    for (int job = 0; job < jobs; job++) {
        pid_t pid = fork();
        if (pid < 0)
            err(1, "fork");
        if (pid == 0) {
            char byte;
            close(gate[1]);
            if (read(gate[0], &byte, 1) < 0)
                err(1, "gate");
            double start = now();
            do {
                results[job].operations += one_pass(directory, job, jobs);
                results[job].end = now();
            } while (results[job].end - start < seconds);
            _exit(0);
        }
    }
    close(gate[0]);
    double start = now(), end = start;
    close(gate[1]);
    long operations = 0;
    for (int job = 0, status; job < jobs; job++)
        if (wait(&status) < 0 || status != 0)
            errx(1, "a job failed");
    for (int job = 0; job < jobs; job++) {
        operations += results[job].operations;
        end = results[job].end > end ? results[job].end : end;
    }
    report(operations, end - start);
}

static int is_dot(const char *name)
{
    return name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0));
}

/* Reads each directory and the attributes of each entry, like find and ls -lR. */
static long walk(int at, const char *name)
{
    long operations = 0;
    DIR *directory = fdopendir(open_directory(at, name));
    if (!directory)
        err(1, "fdopendir");
    struct dirent *entry;
    while ((entry = readdir(directory))) {
        struct stat attributes;
        if (is_dot(entry->d_name))
            continue;
        if (fstatat(dirfd(directory), entry->d_name, &attributes, AT_SYMLINK_NOFOLLOW) < 0)
            err(1, "stat %s", entry->d_name);
        operations++;
        if (S_ISDIR(attributes.st_mode))
            operations += walk(dirfd(directory), entry->d_name);
    }
    closedir(directory);
    return operations;
}

static int subdirectories;

static long walk_share(int directory, int job, int jobs)
{
    long operations = 0;
    char name[16];
    for (int i = job; i < subdirectories; i += jobs) {
        snprintf(name, sizeof name, "d%03d", i);
        operations += walk(directory, name);
    }
    return operations;
}

static int files_per_directory;

static long read_share(int directory, int job, int jobs)
{
    static char buffer[65536];
    long operations = 0;
    char name[32];
    for (int i = job; i < subdirectories; i += jobs)
        for (int j = 0; j < files_per_directory; j++) {
            ssize_t got;
            snprintf(name, sizeof name, "d%03d/f%03d", i, j);
            int fd = openat(directory, name, O_RDONLY);
            if (fd < 0)
                err(1, "open %s", name);
            while ((got = read(fd, buffer, sizeof buffer)) > 0)
                ;
            if (got < 0)
                err(1, "read %s", name);
            close(fd);
            operations++;
        }
    return operations;
}

static long list_names(int at, const char *name)
{
    long operations = 0;
    DIR *directory = fdopendir(open_directory(at, name));
    if (!directory)
        err(1, "fdopendir");
    while (errno = 0, readdir(directory))
        operations++;
    if (errno)
        err(1, "readdir");
    closedir(directory);
    return operations;
}

static long list(int at, int job, int jobs)
{
    (void)job, (void)jobs;
    return list_names(at, ".");
}

static long how_many;

static long create(int directory, int job, int jobs)
{
    (void)job, (void)jobs;
    char name[32];
    for (long i = 0; i < how_many; i++) {
        snprintf(name, sizeof name, "f%06ld", i);
        int fd = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL, 0644);
        if (fd < 0)
            err(1, "create %s", name);
        close(fd);
    }
    return how_many;
}

static long unlink_all(int directory, int job, int jobs)
{
    (void)job, (void)jobs;
    char name[32];
    for (long i = 0; i < how_many; i++) {
        snprintf(name, sizeof name, "f%06ld", i);
        if (unlinkat(directory, name, 0) < 0)
            err(1, "unlink %s", name);
    }
    return how_many;
}

/*
 * The operations of `single`. Each causes, as far as possible, one request of a kind.
 * `i` counts from 0 and never repeats within a directory.
 */
static int top, file, direct_file;
static char *block;

static void name_of(char *name, const char *prefix, long i)
{
    sprintf(name, "%s%06ld", prefix, i);
}

static void must(int result, const char *what)
{
    if (result < 0)
        err(1, "%s", what);
}

static void do_lookup(long i)
{
    struct stat attributes;
    char name[32];
    name_of(name, "have", i);
    must(fstatat(top, name, &attributes, AT_SYMLINK_NOFOLLOW), "lookup");
}

static void do_lookup_missing(long i)
{
    struct stat attributes;
    char name[32];
    name_of(name, "missing", i);
    if (fstatat(top, name, &attributes, AT_SYMLINK_NOFOLLOW) == 0)
        errx(1, "%s is there", name);
}

static void do_getattr(long i)
{
    struct statx attributes;
    (void)i;
    /* This sends a request even if the kernel has cached the attributes. */
    must(statx(file, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &attributes), "getattr");
}

static void do_chmod(long i) { must(fchmod(file, i & 1 ? 0644 : 0600), "chmod"); }

static void do_utimens(long i)
{
    struct timespec times[2] = {{i, 0}, {i, 0}};
    must(futimens(file, times), "utimens");
}

static void do_truncate(long i) { must(ftruncate(file, 1 + (i & 1)), "truncate"); }

static void do_open(long i)
{
    (void)i;
    int fd = openat(top, "direct", O_RDONLY);
    must(fd, "open");
    close(fd);
}

static void do_read(long i) { must(pread(direct_file, block, 4096, (i & 255) * 4096) - 4096, "read"); }
static void do_read_large(long i) { must(pread(direct_file, block, 131072, (i & 7) * 131072) - 131072, "read"); }
static void do_write(long i) { must(pwrite(direct_file, block, 4096, (i & 255) * 4096) - 4096, "write"); }
static void do_write_large(long i) { must(pwrite(direct_file, block, 131072, (i & 7) * 131072) - 131072, "write"); }
static void do_fsync(long i) { (void)i, must(fsync(file), "fsync"); }

static void do_create(long i)
{
    char name[32];
    name_of(name, "new", i);
    int fd = openat(top, name, O_WRONLY | O_CREAT | O_EXCL, 0644);
    must(fd, "create");
    close(fd);
}

static void do_unlink(long i)
{
    char name[32];
    name_of(name, "new", i);
    must(unlinkat(top, name, 0), "unlink");
}

static void do_mkdir(long i)
{
    char name[32];
    name_of(name, "dir", i);
    must(mkdirat(top, name, 0755), "mkdir");
}

static void do_rmdir(long i)
{
    char name[32];
    name_of(name, "dir", i);
    must(unlinkat(top, name, AT_REMOVEDIR), "rmdir");
}

static void do_symlink(long i)
{
    char name[32];
    name_of(name, "link", i);
    must(symlinkat("target", top, name), "symlink");
}

static void do_rename(long i)
{
    const char *names[] = {"moved-a", "moved-b"};
    must(renameat(top, names[i & 1], top, names[~i & 1]), "rename");
}

static void do_readlink(long i)
{
    char target[64];
    (void)i;
    must(readlinkat(top, "symlink", target, sizeof target), "readlink");
}

static void do_getxattr(long i)
{
    char value[64];
    (void)i;
    if (fgetxattr(file, "user.absent", value, sizeof value) >= 0)
        errx(1, "the attribute is there");
}

static void do_statfs(long i)
{
    struct statfs sizes;
    (void)i;
    must(fstatfs(file, &sizes), "statfs");
}

static void do_opendir(long i)
{
    (void)i;
    close(open_directory(top, "hundred"));
}

static void do_readdir(long i)
{
    (void)i;
    list_names(top, "hundred");
}

static const struct operation {
    const char *name;
    void (*once)(long);
    /* The number is limited, because each operation needs a prepared name or leaves one behind. */
    int names;
} operations[] = {
    {"lookup", do_lookup, 1},        {"lookup-missing", do_lookup_missing, 0},
    {"getattr", do_getattr, 0},      {"open", do_open, 0},
    {"read-4k", do_read, 0},         {"read-128k", do_read_large, 0},
    {"write-4k", do_write, 0},       {"write-128k", do_write_large, 0},
    {"create", do_create, 1},        {"unlink", do_unlink, 1},
    {"mkdir", do_mkdir, 1},          {"rmdir", do_rmdir, 1},
    {"symlink", do_symlink, 1},      {"rename", do_rename, 0},
    {"readlink", do_readlink, 0},    {"chmod", do_chmod, 0},
    {"utimens", do_utimens, 0},      {"truncate", do_truncate, 0},
    {"fsync", do_fsync, 0},          {"getxattr", do_getxattr, 0},
    {"statfs", do_statfs, 0},        {"opendir", do_opendir, 0},
    {"readdir-100", do_readdir, 0},
};

static void single(const char *name, double seconds, const char *path)
{
    const struct operation *operation = operations;
    while (strcmp(operation->name, name))
        if (++operation == operations + sizeof operations / sizeof *operations)
            errx(2, "no operation %s", name);
    top = open_directory(AT_FDCWD, path);
    must(file = openat(top, "file", O_RDWR), "open file");
    must(direct_file = openat(top, "direct", O_RDWR | O_DIRECT), "open direct");
    if (posix_memalign((void **)&block, 4096, 131072))
        errx(1, "memory");
    memset(block, 'x', 131072);
    long i = 0;
    double start = now(), end;
    do {
        for (int batch = 0; batch < 50; batch++)
            operation->once(i++);
        end = now();
    } while (operation->names ? i < how_many : end - start < seconds);
    report(i, end - start);
}

static void run_program(const char *work, char **command)
{
    int status;
    double start = now();
    pid_t pid = fork();
    if (pid < 0)
        err(1, "fork");
    if (pid == 0) {
        /* Do not mix the command's output with the result. */
        int null = open("/dev/null", O_WRONLY);
        if (null < 0 || dup2(null, STDOUT_FILENO) < 0)
            err(1, "/dev/null");
        execvp(command[0], command);
        err(127, "%s", command[0]);
    }
    if (waitpid(pid, &status, 0) < 0 || status != 0)
        errx(1, "%s failed", command[0]);
    report(atof(work), now() - start);
}

static void usage(void)
{
    fputs("usage: load ready|drop MOUNTPOINT\n"
          "       load walk SECONDS JOBS DIRECTORY SUBDIRECTORIES\n"
          "       load read SECONDS JOBS DIRECTORY SUBDIRECTORIES FILES\n"
          "       load list SECONDS DIRECTORY\n"
          "       load create|unlink DIRECTORY FILES\n"
          "       load single OPERATION SECONDS NAMES DIRECTORY\n"
          "       load program OPERATIONS COMMAND [ARGUMENT...]\n"
          "       load operations\n",
          stderr);
    exit(2);
}

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    if (argc == 3 && !strcmp(command, "ready")) {
        struct stat attributes;
        must(stat(argv[2], &attributes), argv[2]);
    } else if (argc == 3 && !strcmp(command, "drop")) {
        /* A remount makes the kernel forget all names of this mount, and so its inodes and pages. */
        must(mount(NULL, argv[2], NULL, MS_REMOUNT | MS_NOSUID | MS_NODEV, NULL), argv[2]);
    } else if (argc == 6 && !strcmp(command, "walk")) {
        subdirectories = atoi(argv[5]);
        run_jobs(walk_share, open_directory(AT_FDCWD, argv[4]), atoi(argv[3]), atof(argv[2]));
    } else if (argc == 7 && !strcmp(command, "read")) {
        subdirectories = atoi(argv[5]);
        files_per_directory = atoi(argv[6]);
        run_jobs(read_share, open_directory(AT_FDCWD, argv[4]), atoi(argv[3]), atof(argv[2]));
    } else if (argc == 4 && !strcmp(command, "list")) {
        run_jobs(list, open_directory(AT_FDCWD, argv[3]), 1, atof(argv[2]));
    } else if (argc == 4 && (!strcmp(command, "create") || !strcmp(command, "unlink"))) {
        how_many = atol(argv[3]);
        run_jobs(*command == 'c' ? create : unlink_all, open_directory(AT_FDCWD, argv[2]), 1, 0);
    } else if (argc == 6 && !strcmp(command, "single")) {
        how_many = atol(argv[4]);
        single(argv[2], atof(argv[3]), argv[5]);
    } else if (argc > 3 && !strcmp(command, "program")) {
        run_program(argv[2], argv + 3);
    } else if (argc == 2 && !strcmp(command, "operations")) {
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
            puts(operations[i].name);
    } else
        usage();
    return 0;
}
