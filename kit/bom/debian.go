package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

// debian is a binary package of Debian or of a distribution that is made like it, as it is installed here.
type debian struct {
	name, version         string
	source, sourceVersion string // the source package that it was built from
}

// component is a package among what programs are made of.
func (d debian) component() component { return component{"deb/" + d.name, d.version} }

// distribution is how the distribution of this machine calls itself: debian, ubuntu.
var distribution = sync.OnceValue(func() string {
	text, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(text)) {
		if id, found := strings.CutPrefix(strings.TrimSpace(line), "ID="); found {
			return strings.Trim(id, `"`)
		}
	}
	return "debian"
})

// packages asks dpkg for installed packages. Without a dpkg there are none: how another distribution would say it is not
// known here.
func packages(names ...string) (list []debian, err error) {
	if len(names) == 0 {
		return nil, nil
	}
	out, err := exec.Command("dpkg-query", append([]string{"-W", "-f", "${Package} ${Version} ${source:Package} ${source:Version}\n"}, names...)...).Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask dpkg for the versions of %s, of which something is passed on: %w", strings.Join(names, ", "), err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) != 4 {
			return nil, fmt.Errorf("dpkg-query says %q", line)
		}
		list = append(list, debian{f[0], f[1], f[2], f[3]})
	}
	slices.SortFunc(list, func(a, b debian) int { return cmp.Compare(a.name, b.name) })
	return slices.Compact(list), nil
}

// cLibraries are development packages of Debian whose libraries are linked in, as they are installed here.
func cLibraries(names ...string) (list []component, err error) {
	installed, err := packages(names...)
	for _, p := range installed {
		list = append(list, p.component())
	}
	return list, err
}

// readDistribution reads the list of files that images have of this machine. Without one there are no images yet.
func readDistribution(file string) ([]string, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(text)), err
}

// made are files that belong to no package, because one's installation makes them.
var made = map[string]string{"/etc/ssl/certs/ca-certificates.crt": "ca-certificates"}

// owners are the packages that files of this machine belong to, and stray what belongs to none. Without a dpkg there are neither.
func owners(files []string) (owners []debian, stray []string, err error) {
	if _, err := exec.LookPath("dpkg-query"); err != nil || len(files) == 0 {
		return nil, nil, nil
	}
	names := map[string]bool{}
	// dpkg knows a file by the path that its package has, which on a merged /usr is one of two.
	var ask []string
	for _, file := range files {
		if name, found := made[file]; found {
			names[name] = true
			continue
		}
		ask = append(ask, file)
		if short, found := strings.CutPrefix(file, "/usr"); found {
			ask = append(ask, short)
		}
	}
	// It ends with 1 when one of the paths is none of a package, and one of two never is.
	out, err := exec.Command("dpkg-query", append([]string{"-S"}, ask...)...).Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return nil, nil, fmt.Errorf("ask dpkg whose the files in the images are: %w", err)
	}
	owned := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		who, path, found := strings.Cut(strings.TrimSpace(line), ": ")
		if !found || strings.HasPrefix(who, "diversion ") {
			continue
		}
		for name := range strings.SplitSeq(who, ", ") {
			names[name] = true // with the architecture: libc6:amd64
		}
		owned[path] = true
	}
	for _, file := range files {
		if made[file] == "" && !owned[file] && !owned[strings.TrimPrefix(file, "/usr")] {
			stray = append(stray, file)
		}
	}
	owners, err = packages(slices.Sorted(maps.Keys(names))...)
	return owners, stray, err
}
