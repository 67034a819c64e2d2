package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	classifier "github.com/google/licenseclassifier/v2"
	"github.com/google/licenseclassifier/v2/assets"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
	"golang.org/x/mod/module"
)

// licences are those of everything that is linked in.
type licences struct {
	classifier      *classifier.Classifier
	modCache, goDir string
	of              map[component]found
	named           map[string]string // the expression of a text that was looked at
}

// found is what was found of one component.
type found struct {
	texts      []string // of its licence and notice files
	common     []string // that those refer to
	expression string   // in SPDX's words
}

func newLicences() (*licences, error) {
	c, err := assets.DefaultClassifier()
	if err != nil {
		return nil, err
	}
	env, err := exec.Command("go", "env", "GOMODCACHE", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("ask go where its modules are: %w", err)
	}
	dirs := strings.Fields(string(env))
	if len(dirs) != 2 {
		return nil, fmt.Errorf("go env says %q", env)
	}
	return &licences{classifier: c, modCache: dirs[0], goDir: dirs[1], of: map[component]found{}, named: map[string]string{}}, nil
}

// isLicence matches the names of files that a licence may ask to be passed on.
var isLicence = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|copyright|patents)([-._].*)?$`)

// add finds the licence of a component.
func (l *licences) add(c component) error {
	if _, done := l.of[c]; done {
		return nil
	}
	dir, err := l.dir(c)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for the licence of %s %s: %w", c.path, c.version, err)
	}
	var f found
	names := map[string]bool{}
	for _, e := range entries {
		if e.IsDir() || !isLicence.MatchString(e.Name()) || strings.HasSuffix(e.Name(), ".go") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		f.texts = append(f.texts, string(text))
		for _, name := range strings.Fields(l.name(string(text))) {
			names[name] = true
		}
	}
	if len(f.texts) == 0 {
		return fmt.Errorf("%s %s has no licence file in %s", c.path, c.version, dir)
	}
	if strings.HasPrefix(c.path, "deb/") {
		common, err := commonLicences(f.texts)
		if err != nil {
			return err
		}
		f.common = common
	}
	f.expression = strings.Join(slices.Sorted(maps.Keys(names)), " AND ")
	if f.expression == "" || strings.HasPrefix(c.path, "deb/") {
		f.expression = reference(c)
	}
	l.of[c] = f
	return nil
}

// commonLicence is how a package of Debian names a text that every Debian has, in place of the text.
var commonLicence = regexp.MustCompile(`/usr/share/common-licenses/[A-Za-z0-9.+-]*[A-Za-z0-9]`)

// commonLicences are the texts that a package's own refer to.
func commonLicences(texts []string) (common []string, err error) {
	files := map[string]bool{}
	for _, text := range texts {
		for _, file := range commonLicence.FindAllString(text, -1) {
			if file, err := filepath.EvalSymlinks(file); err == nil { // some are misspelt
				files[file] = true
			}
		}
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		common = append(common, string(text))
	}
	return common, nil
}

// reference names a licence whose text is not one of SPDX's.
func reference(c component) string {
	return "LicenseRef-" + regexp.MustCompile(`[^A-Za-z0-9.]+`).ReplaceAllString(c.path, "-")
}

// name is which of SPDX's licences a text is, or several with spaces between them, or nothing.
func (l *licences) name(text string) string {
	if name, done := l.named[text]; done {
		return name
	}
	names := map[string]bool{}
	for _, m := range l.classifier.Match([]byte(text)).Matches {
		if m.MatchType == "License" {
			names[strings.NewReplacer("GPL-2.0", "GPL-2.0-only", "GPL-3.0", "GPL-3.0-only", "LGPL-2.1", "LGPL-2.1-only").Replace(m.Name)] = true
		}
	}
	l.named[text] = strings.Join(slices.Sorted(maps.Keys(names)), " ")
	return l.named[text]
}

// dir is where a component's licence files are.
func (l *licences) dir(c component) (string, error) {
	if name, ok := strings.CutPrefix(c.path, "deb/"); ok {
		return "/usr/share/doc/" + name, nil
	}
	if c.path == "std" {
		return l.goDir, nil
	}
	path, err := module.EscapePath(c.path)
	if err != nil {
		return "", err
	}
	version, err := module.EscapeVersion(c.version)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(l.modCache, path+"@"+version)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) { // the program was built elsewhere, or long ago
		cmd := exec.Command("go", "mod", "download", c.path+"@"+c.version)
		cmd.Dir = os.TempDir()
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("fetch %s %s for its licence: %w: %s", c.path, c.version, err, out)
		}
	}
	return dir, nil
}

func (l *licences) components() []component {
	return slices.SortedFunc(maps.Keys(l.of), func(a, b component) int {
		return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.version, b.version))
	})
}

// others are the texts of licences that are none of SPDX's.
func (l *licences) others() (list []*v2_3.OtherLicense) {
	seen := map[string]bool{}
	for _, c := range l.components() {
		if f := l.of[c]; f.expression == reference(c) && !seen[f.expression] {
			seen[f.expression] = true
			list = append(list, &v2_3.OtherLicense{LicenseIdentifier: f.expression, LicenseName: c.path, ExtractedText: strings.Join(f.texts, "\n")})
		}
	}
	return list
}
