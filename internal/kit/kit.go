// Package kit finds the programs of other projects that Fathom runs: Kubernetes, etcd, containerd,
// runc, the CNI plugins, CoreDNS and the rest.
//
// The kit is a directory beside the fathom executable. It is not looked up in $PATH: a lab must run
// the versions that it was tested with, whatever else is installed on the machine.
package kit

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Kit is a directory of programs and what versions they are.
type Kit struct {
	// Dir is the kit's directory, absolute.
	Dir string
	// OwnDir is where the programs are that fathom starts or puts into images, and no user does: fathom-init, fathom-agent,
	// fathom-cni, fathom-controller and fathom-mirror. It is the kit's parent, unless $FATHOM_KIT names the kit.
	OwnDir string
	Versions
}

// Versions tells what the kit holds. The field values are written as the projects themselves write
// them: with a leading v where upstream's tags have one.
type Versions struct {
	Kubernetes      string `json:"kubernetes"`
	Etcd            string `json:"etcd"`
	Containerd      string `json:"containerd"`
	Runc            string `json:"runc"`
	CNIPlugins      string `json:"cniPlugins"`
	CNI             string `json:"cni"`
	CoreDNS         string `json:"coredns"`
	CoreDNSImageTag string `json:"corednsImageTag"`
	EtcdImageTag    string `json:"etcdImageTag"`
	// PauseImage is the image that the kit's containerd starts every pod with; the other is what
	// kubeadm writes into configurations. They are the same in most releases.
	PauseImage        string `json:"pauseImage"`
	KubeadmPauseImage string `json:"kubeadmPauseImage"`
	Agnhost           string `json:"agnhost"`
	Flannel           string `json:"flannel"`
	FlannelCNI        string `json:"flannelCNI"`
	HTTPEcho          string `json:"httpEcho"`
}

// Env names the environment variable that overrides where the kit is.
const Env = "FATHOM_KIT"

// Find returns the kit that belongs to the running executable: the directory $FATHOM_KIT names, else
// kit beside the executable, as in a build tree, else lib/fathom/kit beside the executable's bin directory, which is
// where a package and `make install` put it.
func Find() (Kit, error) {
	exe, err := os.Executable()
	if err != nil {
		return Kit{}, fmt.Errorf("find the kit: locate the running executable: %w", err)
	}
	return find(exe)
}

// find is Find for an executable at the given path.
func find(exe string) (Kit, error) {
	// /usr/local/bin/fathom may be a symlink into a build tree; the kit is beside the real file.
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	dir := filepath.Dir(exe)
	if named := os.Getenv(Env); named != "" {
		k, err := Open(named)
		if err != nil {
			return Kit{}, fmt.Errorf("the kit that $%s names: %w", Env, err)
		}
		k.OwnDir = ownDir(dir)
		return k, nil
	}
	places := []string{filepath.Join(dir, "kit"), filepath.Join(dir, "..", "lib", "fathom", "kit")}
	for _, place := range places {
		k, err := Open(place)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		return k, err
	}
	return Kit{}, fmt.Errorf("no kit (Kubernetes, containerd and the other programs a lab runs) in %s; build it with `make kit`, install the package fathom again, or set $%s to where it is",
		strings.Join(places, " or "), Env)
}

// ownDir returns where Fathom's own programs are, for an executable in dir, which does not follow from the kit's place.
func ownDir(dir string) string {
	if _, err := os.Stat(filepath.Join(dir, "fathom-init")); err == nil {
		return dir
	}
	return filepath.Join(dir, "..", "lib", "fathom")
}

// Open returns the kit in dir, with Fathom's own programs beside it.
func Open(dir string) (Kit, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Kit{}, fmt.Errorf("open the kit: %w", err)
	}
	file := filepath.Join(dir, "kit.json")
	data, err := os.ReadFile(file)
	if err != nil {
		return Kit{}, fmt.Errorf("open the kit in %s: %w; build it with `make kit`", dir, err)
	}
	k := Kit{Dir: dir, OwnDir: filepath.Dir(dir)}
	if err := json.Unmarshal(data, &k.Versions); err != nil {
		return Kit{}, fmt.Errorf("open the kit in %s: %s is not what `make kit` writes: %w; build the kit again", dir, file, err)
	}
	return k, nil
}

// Bin returns the path of a program that runs on a node: kubelet, containerd, kubectl, ...
func (k Kit) Bin(name string) string { return filepath.Join(k.Dir, "bin", name) }

// BinDir returns the directory of the programs that run on a node, for a $PATH.
func (k Kit) BinDir() string { return filepath.Join(k.Dir, "bin") }

// CNIDir returns the directory of the reference CNI plugins.
func (k Kit) CNIDir() string { return filepath.Join(k.Dir, "cni") }

// Program returns the path of a program that runs inside a container: coredns, pause, agnhost, ...
func (k Kit) Program(name string) string { return filepath.Join(k.Dir, "programs", name) }

// Own returns the path of a program of Fathom's own: fathom-init, fathom-agent, fathom-cni, fathom-controller.
func (k Kit) Own(name string) string { return filepath.Join(k.OwnDir, name) }

// ImagesDir returns the directory of the local images, an OCI image layout.
func (k Kit) ImagesDir() string { return filepath.Join(k.Dir, "images") }

// Require returns an error that names every one of the given files of the kit that is missing.
// The files are paths as Bin, Program and CNIDir return them.
func (k Kit) Require(files ...string) error {
	var missing []string
	for _, file := range files {
		if _, err := os.Stat(file); err != nil {
			if rel, relErr := filepath.Rel(k.Dir, file); relErr == nil && filepath.IsLocal(rel) {
				file = rel
			}
			missing = append(missing, file)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the kit in %s lacks %s; build it again with `make build`, or install the package fathom again", k.Dir, strings.Join(missing, ", "))
	}
	return nil
}
