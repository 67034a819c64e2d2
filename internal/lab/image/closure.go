package image

import (
	"bufio"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// A library is a shared object that a program needs, with its place in an image.
type library struct {
	// Path is the absolute path at which the dynamic linker finds it in the image.
	Path string
	// Source is the file on this machine, symlinks resolved.
	Source string
}

// trustedDirs are the dynamic linker's default directories. A library from elsewhere goes into the last of them, because an
// image has no ld.so.cache. Rejected: writing that file, which takes much more code for the same result.
var trustedDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
	"/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// linker finds shared libraries as this machine's dynamic linker would. It only reads files, unlike ldd, which runs the
// program.
type linker struct {
	dirs []string
}

// newLinker returns a linker that searches the directories in /etc/ld.so.conf and the default ones.
func newLinker() *linker {
	dirs := readLinkerConfig("/etc/ld.so.conf", 0)
	return &linker{dirs: append(dirs, trustedDirs...)}
}

// readLinkerConfig returns the directories that an ld.so.conf and its includes name.
func readLinkerConfig(file string, depth int) []string {
	if depth > 8 {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil // many distributions have none
	}
	defer f.Close()
	var dirs []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case fields[0] == "include":
			for _, pattern := range fields[1:] {
				if !filepath.IsAbs(pattern) {
					pattern = filepath.Join(filepath.Dir(file), pattern)
				}
				files, _ := filepath.Glob(pattern)
				for _, included := range files {
					dirs = append(dirs, readLinkerConfig(included, depth+1)...)
				}
			}
		default:
			dirs = append(dirs, fields[0])
		}
	}
	return dirs
}

// closure returns all libraries and interpreters that the given programs (or libraries) need to run, sorted by path. A
// static program needs none.
func (l *linker) closure(files ...string) ([]library, error) {
	found := map[string]library{} // by path in the image
	seen := map[string]bool{}     // by source
	queue := append([]string(nil), files...)
	for len(queue) > 0 {
		file := queue[0]
		queue = queue[1:]
		if seen[file] {
			continue
		}
		seen[file] = true
		needs, err := l.needs(file)
		if err != nil {
			return nil, err
		}
		for _, lib := range needs {
			found[lib.Path] = lib
			queue = append(queue, lib.Source)
		}
	}
	libs := make([]library, 0, len(found))
	for _, lib := range found {
		libs = append(libs, lib)
	}
	sort.Slice(libs, func(i, j int) bool { return libs[i].Path < libs[j].Path })
	return libs, nil
}

// needs returns the direct dependencies of one ELF file.
func (l *linker) needs(file string) ([]library, error) {
	r, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read the shared libraries that %s needs: %w", file, err)
	}
	defer r.Close()
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := r.ReadAt(magic, 0); err != nil || string(magic) != elf.ELFMAG {
		return nil, nil // a script: its interpreter is another program of the image
	}
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, fmt.Errorf("read the shared libraries that %s needs: %w", file, err)
	}

	var libs []library
	for _, segment := range f.Progs {
		if segment.Type != elf.PT_INTERP || segment.Filesz == 0 || segment.Filesz > 4096 {
			continue
		}
		name := make([]byte, segment.Filesz)
		if _, err := segment.ReadAt(name, 0); err != nil {
			return nil, fmt.Errorf("read the interpreter that %s needs: %w", file, err)
		}
		path := strings.TrimRight(string(name), "\x00")
		source, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fmt.Errorf("find the interpreter %s that %s needs: %w", path, file, err)
		}
		// The kernel opens this very path, so it must not be replaced by the symlink's target.
		libs = append(libs, library{Path: merged(path), Source: source})
	}

	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, nil // no dynamic section: static
	}
	own, err := runPath(f, file)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		lib, err := l.find(name, own, f.Machine, f.Class)
		if err != nil {
			return nil, fmt.Errorf("find the shared library %s that %s needs: %w; reinstall the package that %s belongs to", name, file, err, file)
		}
		libs = append(libs, lib)
	}
	return libs, nil
}

// runPath returns the directories that the file itself names (RUNPATH or RPATH), with $ORIGIN replaced.
func runPath(f *elf.File, file string) ([]string, error) {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			return nil, fmt.Errorf("read the run path of %s: %w", file, err)
		}
		for _, value := range values {
			for _, dir := range filepath.SplitList(value) {
				origin := filepath.Dir(file)
				dir = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir)
				if filepath.IsAbs(dir) {
					dirs = append(dirs, dir)
				}
			}
		}
	}
	return dirs, nil
}

// find looks up a library by the name in DT_NEEDED. It skips files for other machines, as the dynamic linker does: a
// multi-arch system has several libraries of one name.
func (l *linker) find(name string, own []string, machine elf.Machine, class elf.Class) (library, error) {
	if strings.Contains(name, "/") {
		source, err := filepath.EvalSymlinks(name)
		return library{Path: merged(name), Source: source}, err
	}
	for i, dir := range append(append([]string(nil), own...), l.dirs...) {
		source, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if err != nil || !isFor(source, machine, class) {
			continue
		}
		realDir, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue
		}
		switch {
		case i < len(own):
			// The program names the directory, so the library stays in it.
		case !isTrusted(realDir):
			realDir = "/usr/lib"
		}
		return library{Path: filepath.Join(merged(realDir), name), Source: source}, nil
	}
	return library{}, fmt.Errorf("%w in %s", fs.ErrNotExist, strings.Join(l.dirs, ", "))
}

func isFor(file string, machine elf.Machine, class elf.Class) bool {
	f, err := elf.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Machine == machine && f.Class == class
}

func isTrusted(dir string) bool {
	for _, trusted := range trustedDirs {
		if dir == trusted {
			return true
		}
	}
	return false
}

// merged returns the path with /lib, /lib64, /bin and /sbin moved below /usr: our images have one directory for each, and
// symlinks at the root, as current distributions do.
func merged(path string) string {
	for _, top := range []string{"/lib/", "/lib64/", "/bin/", "/sbin/"} {
		if strings.HasPrefix(path+"/", top) {
			return "/usr" + path
		}
	}
	return path
}
