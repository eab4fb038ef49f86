/* Stands in for a program, or is started where a verb is: tries what it was told to, says what was possible,
 * and becomes the real program.
 *
 * PROBE_FD   an open file for the answers, one line for each run: "NAME column=yes|no ..."
 * PROBE_DO   lines "column operation argument"
 * PROBE_REAL the directory of the real programs; those in PROBE_STOP ("a,b") fail instead
 * PROBE_NAME the name to answer by, instead of the program's own
 *
 * Built with -DLIBRARY it stands in for libhivex, whose file is REAL: it tries when a hive is opened, and hands
 * every call on.
 *
 * System calls are made without the C library's wrappers, so that a refusal is the kernel's. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static char out[8192];

static void say(const char *column, const char *answer) {
  size_t n = strlen(out);
  snprintf(out + n, sizeof out - n, "\t%s=%s", column, answer);
}

static void can(const char *column, int able) { say(column, able ? "yes" : "no"); }

static int opens(const char *path, int flags) {
  int fd = open(path, flags | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

static int makes(const char *folder) {
  char path[4096];
  snprintf(path, sizeof path, "%s/hyper2kvm-probe-%d", folder, (int)getpid());
  int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return 0;
  close(fd);
  unlink(path);
  return 1;
}

static int connects(const char *path, int abstract) {
  struct sockaddr_un name = {.sun_family = AF_UNIX};
  socklen_t length = sizeof name;
  if (abstract) {
    memcpy(name.sun_path + 1, path, strlen(path));
    length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(path);
  } else {
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
  }
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int able = fd >= 0 && connect(fd, (struct sockaddr *)&name, length) == 0;
  if (fd >= 0) close(fd);
  return able;
}

static int reaches(const char *port) {
  struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int able = fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof name) == 0;
  if (fd >= 0) close(fd);
  return able;
}

/* Calls with arguments that the kernel refuses for another reason than EPERM, whoever asks. */
static void calls(const char *column) {
  long open_calls = 0, count = 0;
  char names[1024] = "";
#define TRY(call, ...)                                              \
  do {                                                              \
    errno = 0;                                                      \
    count++;                                                        \
    if (syscall(SYS_##call, ##__VA_ARGS__) >= 0 || errno != EPERM) { \
      open_calls++;                                                 \
      strcat(strcat(names, "+"), #call);                            \
    }                                                               \
  } while (0)
  TRY(ptrace, 16 /* PTRACE_ATTACH */, -1, 0, 0);
  TRY(process_vm_readv, -1, 0, 0, 0, 0, 0);
  TRY(keyctl, 99, 0, 0, 0, 0);
  TRY(memfd_create, 0, 0);
  TRY(inotify_init1, 0x7fffffff);
  TRY(socketpair, AF_UNIX, 99, 0, 0);
  TRY(connect, -1, 0, 0);
  TRY(bind, -1, 0, 0);
  TRY(unlinkat, -1, "x", 0);
  TRY(renameat2, -1, "x", -1, "y", 0);
  TRY(linkat, -1, "x", -1, "y", 0);
  TRY(symlinkat, "x", -1, "y");
  TRY(mkdirat, -1, "x", 0700);
  TRY(mknodat, -1, "x", S_IFREG, 0);
  TRY(fchmodat, -1, "x", 0);
  TRY(fchownat, -1, "x", -1, -1, 0);
  TRY(setrlimit, 99, 0);
  TRY(setpriority, 99, 0, 0);
  TRY(pidfd_open, -1, 0);
  TRY(execveat, -1, "x", 0, 0, 0);
  TRY(unshare, 0x7fffffff);
  if (open_calls == 0) say(column, "listed");
  else if (open_calls == count) say(column, "any");
  else say(column, names);
}

#define STATUS "/proc/self/status"
#ifdef LIBRARY
/* Opened while that is possible; what is read is the present state. */
static int status_files[2], next_status;
#define OPEN_STATUS() status_files[next_status++ % 2]
#else
#define OPEN_STATUS() open(STATUS, O_RDONLY | O_CLOEXEC)
#endif

static void status(const char *column, const char *wanted) {
  char text[8192], answer[256] = "none";
  int fd = OPEN_STATUS();
  ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
  if (fd >= 0) close(fd);
  if (size < 0) {
    say(column, "unreadable");
    return;
  }
  text[size] = 0;
  for (char *rest, *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    unsigned long long value;
    char key[32];
    if (sscanf(line, "%31[^:]:\t%llx", key, &value) != 2) continue;
    if (!strcmp(wanted, "nnp") ? !strcmp(key, "NoNewPrivs") : 0) strcpy(answer, value ? "no" : "yes");
    if (!strcmp(wanted, "caps") && !strncmp(key, "Cap", 3) && value) {
      char set[64];
      snprintf(set, sizeof set, "%s%s:%llx", strcmp(answer, "none") ? "," : "", key, value);
      if (!strcmp(answer, "none")) answer[0] = 0;
      strcat(answer, set);
    }
  }
  say(column, answer);
}

static void attempt(const char *column, const char *operation, const char *argument) {
  if (!strcmp(operation, "read")) can(column, opens(argument, O_RDONLY));
  else if (!strcmp(operation, "write")) can(column, opens(argument, O_WRONLY));
  else if (!strcmp(operation, "make")) can(column, makes(argument));
  else if (!strcmp(operation, "unix")) can(column, connects(argument, 0));
  else if (!strcmp(operation, "abstract")) can(column, connects(argument, 1));
  else if (!strcmp(operation, "tcp")) can(column, reaches(argument));
  else if (!strcmp(operation, "signal")) can(column, kill(atoi(argument), 0) == 0);
  else if (!strcmp(operation, "calls")) calls(column);
  else status(column, operation);
}

static void attempts(const char *name) {
  snprintf(out, sizeof out, "%s", name);
  char *todo = strdup(getenv("PROBE_DO"));
  for (char *rest, *line = strtok_r(todo, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    char *column = strtok(line, " "), *operation = strtok(NULL, " "), *argument = strtok(NULL, "");
    attempt(column, operation, argument ? argument : "");
  }
}

#ifdef LIBRARY
#include <dlfcn.h>
#include <sys/wait.h>

#define FUNCTIONS(F)                                                                                       \
  F(hivex_close) F(hivex_commit) F(hivex_root) F(hivex_node_name) F(hivex_node_children)                   \
  F(hivex_node_get_child) F(hivex_node_add_child) F(hivex_node_delete_child) F(hivex_node_values)          \
  F(hivex_node_set_values) F(hivex_value_key) F(hivex_value_value)

typedef long (*function)(long, long, long, long, long);
#define FORWARD(name)                                                                                      \
  static function real_##name;                                                                             \
  long name(long a, long b, long c, long d, long e) { return real_##name(a, b, c, d, e); }
FUNCTIONS(FORWARD)
static void *(*real_open)(const char *, int);

__attribute__((constructor)) static void load(void) {
  void *library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
#define FIND(name) real_##name = (function)dlsym(library, #name);
  FUNCTIONS(FIND)
  real_open = (void *(*)(const char *, int))dlsym(library, "hivex_open");
  for (int i = 0; i < 2; i++) status_files[i] = open(STATUS, O_RDONLY | O_CLOEXEC);
}

static int starts_programs(void) {
  int state = 1, child = fork();
  if (child == 0) {
    execl("/bin/true", "true", NULL);
    _exit(1);
  }
  if (child > 0) return waitpid(child, &state, 0) == child && state == 0;
  errno = 0;
  return syscall(SYS_execve, "/nonexistent", NULL, NULL) != 0 && errno == ENOENT;
}

void *hivex_open(const char *file, int flags) {
  attempts("libhivex");
  can("programs", starts_programs());
  strcat(out, "\n");
  /* dprintf asks for the flags of its descriptor. */
  if (write(atoi(getenv("PROBE_FD")), out, strlen(out)) < 0) return NULL;
  return real_open(file, flags);
}
#else

int main(int argc, char **argv) {
  char *fd = getenv("PROBE_FD"), *real = getenv("PROBE_REAL");
  char *name = getenv("PROBE_NAME"), *stop = getenv("PROBE_STOP");
  const char *tool = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
  char path[4096], list[1024], shell[16384];
  if (argc > 1 && !strcmp(argv[1], "--landlock")) {
    printf("%ld\n", syscall(444 /* landlock_create_ruleset */, NULL, 0, 1));
    return 0;
  }
  attempts(name && strcmp(name, "") ? name : tool);
  int answers = atoi(fd);
  dprintf(answers, "%s\n", out);
  /* Another program: it says so itself, and goes on as we would. */
  snprintf(path, sizeof path, "%s/%s", real, tool);
  snprintf(list, sizeof list, ",%s,", stop ? stop : "");
  snprintf(shell, sizeof shell, ",%s,", tool);
  int ends = strstr(list, shell) != NULL || access(path, F_OK) != 0;
  *strchr(out, '\t') = 0;
  snprintf(shell, sizeof shell, "printf '%s\\tprograms=yes\\n' >&%d; exec \"$@\"", out, answers);
  char **args = calloc(argc + 8, sizeof *args);
  int n = 0;
  args[n++] = "sh";
  args[n++] = "-c";
  args[n++] = shell;
  args[n++] = "sh";
  args[n++] = ends ? "/bin/false" : path;
  for (int i = 1; i < argc && !ends; i++) args[n++] = argv[i];
  execv("/bin/sh", args);
  if (ends) return 1;
  /* A confined program may start its loader, hence again what the loader can read. */
  args[3] = LOADER;
  args[4] = path;
  execv(LOADER, args + 3);
  return 126;
}
#endif
