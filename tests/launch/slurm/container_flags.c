/* Accepts the options that NVIDIA's pyxis adds to srun and writes them to the file $CONTAINER_FLAGS of the caller's
   environment. It starts no container: it is there so that a real srun takes the lines that are meant for pyxis. */
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>

SPANK_PLUGIN(container_flags, 1);

static const char *names[] = {"container-image", "container-mounts", "container-workdir", "container-env"};

static int note(int number, const char *value, int remote) {
    const char *path = getenv("CONTAINER_FLAGS");
    FILE *file = remote || path == NULL ? NULL : fopen(path, "a");
    if (file != NULL) {
        fprintf(file, "%s=%s\n", names[number], value);
        fclose(file);
    }
    return 0;
}

struct spank_option spank_options[] = {
    {"container-image", "IMAGE", "pyxis", 1, 0, note},
    {"container-mounts", "MOUNTS", "pyxis", 1, 1, note},
    {"container-workdir", "FOLDER", "pyxis", 1, 2, note},
    {"container-env", "NAMES", "pyxis", 1, 3, note},
    SPANK_OPTIONS_TABLE_END
};

int slurm_spank_init(spank_t spank, int argc, char **argv) { return 0; }
