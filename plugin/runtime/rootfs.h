/* The container's root file system, whose content the container controls. */
#ifndef FREEFLOW_ROOTFS_H
#define FREEFLOW_ROOTFS_H

/*
 * Whether a program in it can preload a library of this machine's kind; then it gets the
 * directory for the mount. `bundle` is the folder that a relative path starts from. Returns 1 or
 * 0.
 */
int prepare_rootfs(int bundle, const char *path);

#endif
