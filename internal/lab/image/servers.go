package image

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/kit"
)

// The layers of servers that courses use.
const (
	layerNginx     = "nginx"
	layerMultitool = "multitool"
	layerHTTPD     = "httpd"
	layerRedis     = "redis"
	layerPython    = "python"
	layerEcho      = "echo"
)

//go:embed servers
var serverFiles embed.FS

// servers holds packages of the distribution that kit/debian has unpacked without installing them.
type servers struct {
	dir          string
	distribution string
	versions     map[string]string // by package
}

// findServers returns the kit's unpacked packages, or nil if it has none, as on a machine without apt.
func findServers(k kit.Kit) (*servers, error) {
	s := &servers{dir: filepath.Join(k.Dir, "debian"), versions: map[string]string{}}
	text, err := os.ReadFile(filepath.Join(s.dir, "packages"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if name, version, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			s.versions[name] = version
		}
	}
	distribution, err := os.ReadFile(filepath.Join(s.dir, "distribution"))
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	s.distribution = strings.TrimSpace(string(distribution))
	return s, nil
}

// python returns the name of the interpreter, which is its package's without "-minimal": python3.11.
func (s *servers) python() string {
	for name := range s.versions {
		if m := regexp.MustCompile(`^(python3\.\d+)-minimal$`).FindStringSubmatch(name); m != nil {
			return m[1]
		}
	}
	return ""
}

// recipes returns the images of servers.
func (s *servers) recipes() []recipe {
	if s == nil {
		return nil
	}
	of := func(what, pkg string) string {
		version := s.versions[pkg]
		if _, less, ok := strings.Cut(version, ":"); ok {
			version = less // the epoch is Debian's; the program does not report it
		}
		return what + " " + version + " of " + s.distribution
	}
	on := func(layers ...string) []string { return append([]string{layerBusybox, layerTools}, layers...) }
	config := func(port string, entrypoint []string, command ...string) v1.Config {
		c := v1.Config{Env: []string{searchPath}, Entrypoint: entrypoint, Cmd: command, WorkingDir: "/"}
		if port != "" {
			c.ExposedPorts = map[string]struct{}{port + "/tcp": {}}
		}
		return c
	}
	one := func(name, what string, c v1.Config, layers ...string) recipe {
		return recipe{names: []string{standin.Image(name)}, standIn: what, layers: on(layers...), config: c}
	}
	nginx, python := of("nginx", "nginx"), of("Python", s.python()+"-minimal")
	httpd := config("80", nil, "httpd-foreground")
	httpd.Env = []string{"PATH=/usr/local/apache2/bin:" + strings.TrimPrefix(searchPath, "PATH=")}
	httpd.WorkingDir = "/usr/local/apache2"
	redis := config("6379", []string{"docker-entrypoint.sh"}, "redis-server")
	redis.WorkingDir = "/data"
	all := []recipe{
		one("nginx", nginx, config("80", []string{"/docker-entrypoint.sh"}, "nginx", "-g", "daemon off;"), layerNginx),
		one("multitool", "the lab's tools, and "+nginx, config("80", []string{"/multitool-entrypoint.sh"}, "nginx", "-g", "daemon off;"), layerNginx, layerMultitool),
		one("httpd", of("Apache", "apache2-bin"), httpd, layerHTTPD),
		one("redis", of("Redis", "redis-server"), redis, layerRedis),
		one("python", python, config("", nil, "python3"), layerPython),
	}
	for name, port := range map[string]string{"whoami": "80", "echoserver": "8080"} {
		all = append(all, one(name, "a program of Fathom's that answers the same, with "+python, config(port, []string{"/" + name}), layerPython, layerEcho))
	}
	slices.SortFunc(all, func(a, b recipe) int { return strings.Compare(a.names[0], b.names[0]) })
	return all
}

// trees returns the layers of servers, without what the layer of tools below them has.
func (s *servers) trees(tools tree) (map[string]tree, error) {
	if s == nil {
		return nil, nil
	}
	all := map[string]tree{}
	for name, fill := range map[string]func(tree) error{
		layerNginx: s.nginx, layerMultitool: s.multitool, layerHTTPD: s.httpd, layerRedis: s.redis, layerPython: s.pythonTree, layerEcho: s.echo,
	} {
		t := tree{}
		if err := fill(t); err != nil {
			return nil, fmt.Errorf("build images: the layer %s of packages in %s: %w; unpack them again with `make kit` after removing that directory", name, s.dir, err)
		}
		for at := range t {
			if _, twice := tools[at]; twice {
				delete(t, at)
			}
		}
		all[name] = t
	}
	return all, nil
}

func (s *servers) nginx(t tree) error {
	if err := s.program(t, "/usr/bin/nginx", "usr/sbin/nginx"); err != nil {
		return err
	}
	for _, name := range []string{"mime.types", "fastcgi_params", "scgi_params", "uwsgi_params"} {
		t.copy("/etc/nginx/"+name, filepath.Join(s.dir, "etc/nginx", name), 0o644)
	}
	t.copy("/usr/share/nginx/html/index.html", filepath.Join(s.dir, "usr/share/nginx/html/index.html"), 0o644)
	t.write("/usr/share/nginx/html/50x.html", "<!DOCTYPE html>\n<title>Error</title>\n<h1>An error occurred.</h1>\n", 0o644)
	t.link("/var/log/nginx/access.log", "/dev/stdout")
	t.link("/var/log/nginx/error.log", "/dev/stderr")
	t.dir("/var/lib/nginx", 0o755)
	t.dir("/var/cache/nginx", 0o755)
	// nginx's configurations say `user nginx`.
	t.write("/etc/passwd", passwd+"nginx:x:101:101:nginx:/:/bin/false\n", 0o644)
	t.write("/etc/group", group+"nginx:x:101:\n", 0o644)
	return errors.Join(
		s.text(t, "/etc/nginx/nginx.conf", "nginx.conf", 0o644),
		s.text(t, "/etc/nginx/conf.d/default.conf", "default.conf", 0o644),
		s.text(t, "/docker-entrypoint.sh", "nginx-entrypoint.sh", 0o755),
		s.licences(t, "nginx", "nginx-common"),
	)
}

func (s *servers) multitool(t tree) error {
	return s.text(t, "/multitool-entrypoint.sh", "multitool-entrypoint.sh", 0o755)
}

var moduleLine = regexp.MustCompile(`(?m)^LoadModule \S+ modules/(\S+)$`)

func (s *servers) httpd(t tree) error {
	const root = "/usr/local/apache2"
	if err := s.program(t, root+"/bin/httpd", "usr/sbin/apache2"); err != nil {
		return err
	}
	conf, err := serverFiles.ReadFile("servers/httpd.conf")
	if err != nil {
		return err
	}
	for _, m := range moduleLine.FindAllStringSubmatch(string(conf), -1) {
		if err := s.program(t, root+"/modules/"+m[1], "usr/lib/apache2/modules/"+m[1]); err != nil {
			return err
		}
	}
	t.write(root+"/conf/httpd.conf", string(conf), 0o644)
	t.link("/etc/apache2/apache2.conf", root+"/conf/httpd.conf") // where Debian's program looks
	t.write(root+"/htdocs/index.html", "<html><body><h1>It works!</h1></body></html>\n", 0o644)
	t.dir(root+"/logs", 0o755)
	return errors.Join(
		s.text(t, root+"/bin/httpd-foreground", "httpd-foreground", 0o755),
		s.licences(t, "apache2-bin", "libapr1", "libapr1t64", "libaprutil1", "libaprutil1t64"),
	)
}

func (s *servers) redis(t tree) error {
	t.dir("/data", 0o755)
	t.link("/usr/bin/redis-server", "redis-check-rdb") // one program, by its name
	return errors.Join(
		s.program(t, "/usr/bin/redis-check-rdb", "usr/bin/redis-check-rdb"),
		s.program(t, "/usr/bin/redis-cli", "usr/bin/redis-cli"),
		s.text(t, "/usr/bin/docker-entrypoint.sh", "redis-entrypoint.sh", 0o755),
		s.licences(t, "redis-server", "redis-tools", "liblzf1", "libjemalloc2", "libatomic1"),
	)
}

// pythonLess are the parts of the standard library that no server in a pod needs.
var pythonLess = []string{"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle.py", "venv", "sitecustomize.py"}

func (s *servers) pythonTree(t tree) error {
	name := s.python()
	if name == "" {
		return errors.New("there is no Python in it")
	}
	if err := s.program(t, "/usr/bin/"+name, "usr/bin/"+name); err != nil {
		return err
	}
	t.link("/usr/bin/python3", name)
	t.link("/usr/bin/python", name)
	library := filepath.Join(s.dir, "usr/lib", name)
	err := filepath.WalkDir(library, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(library, file)
		if err != nil {
			return err
		}
		if slices.Contains(pythonLess, rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		at := path.Join("/usr/lib", name, filepath.ToSlash(rel))
		if strings.HasSuffix(rel, ".so") && s.lacks(file) {
			return nil // a module for a library that this machine lacks, such as Berkeley DB: `import` reports that
		}
		if !d.Type().IsRegular() {
			return nil
		}
		return s.program(t, at, path.Join("usr/lib", name, filepath.ToSlash(rel)))
	})
	return errors.Join(err, s.licences(t, name+"-minimal", "lib"+name+"-minimal", "lib"+name+"-stdlib", "libexpat1"))
}

func (s *servers) echo(t tree) error {
	t.link("/echoserver", "whoami")
	text, err := serverFiles.ReadFile("servers/echo.py")
	if err != nil {
		return err
	}
	t.write("/whoami", "#!/usr/bin/python3 -u\n"+string(text), 0o755)
	return nil
}

// text adds one of the files in the directory servers.
func (s *servers) text(t tree, at, name string, mode fs.FileMode) error {
	data, err := serverFiles.ReadFile("servers/" + name)
	t.write(at, string(data), mode)
	return err
}

// linker searches the packages first, so that the machine need not have the libraries.
func (s *servers) linker() *linker {
	l := newLinker()
	var own []string
	for _, dir := range trustedDirs {
		own = append(own, filepath.Join(s.dir, dir))
	}
	l.dirs = append(own, l.dirs...)
	return l
}

// lacks reports whether a library that the file needs cannot be found.
func (s *servers) lacks(file string) bool {
	_, err := s.linker().closure(file)
	return errors.Is(err, fs.ErrNotExist)
}

// program adds a file of the packages and, if it is a program or a module, the libraries that it needs.
func (s *servers) program(t tree, at, name string) error {
	file, err := filepath.EvalSymlinks(filepath.Join(s.dir, name))
	if err != nil {
		return err
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	libs, err := s.linker().closure(file)
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	t.copy(at, file, mode)
	for _, lib := range libs {
		t.copy(lib.Path, lib.Source, 0o755)
	}
	return nil
}

// licences adds the copyright files of the packages, where Debian has them.
func (s *servers) licences(t tree, packages ...string) error {
	for _, name := range packages {
		if _, ok := s.versions[name]; !ok {
			continue // named differently in another release
		}
		file := filepath.Join(s.dir, "usr/share/doc", name, "copyright")
		real, err := filepath.EvalSymlinks(file)
		if err != nil {
			// Some packages' directory is a link to another package's.
			continue
		}
		t.copy("/usr/share/doc/"+name+"/copyright", real, 0o644)
	}
	return nil
}
